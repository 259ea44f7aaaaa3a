"""The phases of a close-out: legal moves, and illegal ones that change nothing."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consumer.phases import LEGAL_MOVES, IllegalMoveError, PhaseMachine, TransactionPhase, diagram

P = TransactionPhase
# Written out from the contract, not taken from the code.
LINE = [
    P.NOT_STARTED,
    P.INCIDENT_CREATED,
    P.POLICY_EVALUATED,
    P.TRACE_COMPLETED,
    P.COMMITTED,
    P.EVENTS_PUBLISHED,
]
BEFORE_COMMITTED = LINE[:4]
LEGAL = {
    *pairwise(LINE),
    *((phase, end) for phase in BEFORE_COMMITTED for end in (P.ROLLED_BACK, P.FAILED)),
}


def test_the_phases_are_those_of_the_contract():
    assert {phase.value for phase in P} == {*(phase.name for phase in LINE), "ROLLED_BACK", "FAILED"}
    assert all(str(phase) == phase.name for phase in P)


@pytest.mark.parametrize("target", P)
@pytest.mark.parametrize("start", P)
def test_the_legal_moves_are_those_of_the_contract(start: TransactionPhase, target: TransactionPhase):
    machine = PhaseMachine(start)
    if (start, target) in LEGAL:
        assert machine.advance(target) is target
        assert machine.current is target
    else:
        with pytest.raises(IllegalMoveError) as caught:
            machine.advance(target)
        assert machine.current is start
        assert (caught.value.current, caught.value.target) == (start, target)


@settings(max_examples=500, deadline=None, database=None)
@given(st.lists(st.sampled_from(P), max_size=20))
def test_any_sequence_of_moves_is_legal_and_illegal_moves_change_nothing(targets: list[TransactionPhase]):
    machine = PhaseMachine()
    expected = P.NOT_STARTED
    for target in targets:
        if (expected, target) in LEGAL:
            expected = machine.advance(target)
        else:
            with pytest.raises(IllegalMoveError):
                machine.advance(target)
        assert machine.current is expected


@settings(max_examples=100, deadline=None, database=None)
@given(st.lists(st.sampled_from(P), max_size=40))
def test_a_committed_run_can_only_become_published(targets: list[TransactionPhase]):
    machine = PhaseMachine(P.COMMITTED)
    for target in targets:
        if target is P.EVENTS_PUBLISHED and machine.current is P.COMMITTED:
            machine.advance(target)
            continue
        with pytest.raises(IllegalMoveError):
            machine.advance(target)
    assert machine.current in {P.COMMITTED, P.EVENTS_PUBLISHED}


@pytest.mark.parametrize("start", BEFORE_COMMITTED)
@pytest.mark.parametrize("end", [P.ROLLED_BACK, P.FAILED])
def test_rolled_back_and_failed_are_final(start: TransactionPhase, end: TransactionPhase):
    machine = PhaseMachine(start)
    machine.advance(end)
    for target in P:
        with pytest.raises(IllegalMoveError):
            machine.advance(target)
    assert machine.current is end


def test_an_illegal_move_names_the_legal_ones():
    with pytest.raises(IllegalMoveError) as caught:
        PhaseMachine().advance(P.COMMITTED)
    assert str(caught.value) == (
        "cannot move from NOT_STARTED to COMMITTED; legal moves: FAILED, INCIDENT_CREATED, ROLLED_BACK"
    )
    with pytest.raises(IllegalMoveError) as caught:
        PhaseMachine(P.FAILED).advance(P.NOT_STARTED)
    assert str(caught.value) == "cannot move from FAILED to NOT_STARTED; legal moves: none, the phase is final"


def test_a_machine_starts_at_not_started_and_its_phase_cannot_be_set():
    machine = PhaseMachine()
    assert machine.current is P.NOT_STARTED
    with pytest.raises(AttributeError):
        machine.current = P.COMMITTED  # type: ignore[misc]
    with pytest.raises(TypeError):
        LEGAL_MOVES[P.FAILED] = frozenset(P)  # type: ignore[index]


def test_the_diagram_has_exactly_the_legal_moves():
    lines = diagram().splitlines()
    arrows = [tuple(line.strip().split(" --> ")) for line in lines[1:]]
    ends = {("[*]", "NOT_STARTED"), *((end, "[*]") for end in ("EVENTS_PUBLISHED", "ROLLED_BACK", "FAILED"))}
    assert lines[0] == "stateDiagram-v2"
    assert len(arrows) == len(set(arrows))
    assert set(arrows) == {(str(start), str(target)) for start, target in LEGAL} | ends


def test_each_phase_that_is_entered_is_observed():
    entered: list[P] = []
    machine = PhaseMachine(on_phase=entered.append)
    machine.advance(P.INCIDENT_CREATED)
    machine.advance(P.ROLLED_BACK)
    assert entered == [P.INCIDENT_CREATED, P.ROLLED_BACK]
