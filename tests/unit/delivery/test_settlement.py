"""The settlement of a delivery by its outcome or the classification of its error."""

import asyncio
from typing import Any, get_args
from uuid import uuid4

import aiormq.exceptions
import asyncpg
import pytest
from sqlalchemy import exc as sa

from consumer.closeout.outcome import Failed, TransactionFailed, TransactionResult
from consumer.contract.refusals import MessageRefusedError, ParkReason
from consumer.delivery.settlement import Ack, Park, PauseAndRequeue, RetryLater, Settlement, settle
from consumer.errors import Fault, UnavailableError, fault_of, lies_in_data, one_line
from consumer.phases import TransactionPhase

MOMENT_STATES = [
    "08000", "08006", "40001", "40P01", "53100", "53300", "57014", "57P01", "57P03", "58030", "25006", "25P03", "25P04",
    "28000", "28P01", "3D000", "3F000", "42501", "42P01", "42703", "55P03", "55006", "XX000",
]  # fmt: skip
OTHER_STATES = [
    "22001",
    "22003",
    "22P05",
    "23502",
    "23503",
    "23505",
    "23514",
    "42601",
    "42804",
    "0A000",
    "54000",
    "P0001",
]


class Coded(Exception):  # noqa: N818 - what a driver raises, reduced to its SQLSTATE
    def __init__(self, sqlstate: object) -> None:
        super().__init__(f"server said {sqlstate}")
        self.sqlstate = sqlstate


def database_error(origin: BaseException, *, invalidated: bool = False) -> sa.DBAPIError:
    return sa.DBAPIError("INSERT secret", {"p": "secret"}, origin, connection_invalidated=invalidated)


def failed(cause: BaseException) -> TransactionFailed:
    error = TransactionFailed(
        phase=TransactionPhase.INCIDENT_CREATED, results=(), operations=(), rolled_back=True, cause=cause
    )
    error.__cause__ = cause
    return error


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


FAULTS: list[tuple[BaseException, Fault]] = [
    *((Coded(state), Fault.TRANSIENT) for state in MOMENT_STATES),
    *((database_error(Coded(state)), Fault.TRANSIENT) for state in MOMENT_STATES),
    *((Coded(state), Fault.UNKNOWN) for state in OTHER_STATES),
    *((failed(database_error(Coded(state))), Fault.UNKNOWN) for state in OTHER_STATES),
    (MessageRefusedError("invalid_json", "x"), Fault.MESSAGE),
    (failed(MessageRefusedError("invalid_json", "x")), Fault.MESSAGE),
    (caused(RuntimeError(), MessageRefusedError("invalid_json", "x")), Fault.MESSAGE),
    (UnavailableError("away"), Fault.TRANSIENT),
    (TimeoutError(), Fault.TRANSIENT),
    (ConnectionRefusedError(), Fault.TRANSIENT),
    (ConnectionResetError(), Fault.TRANSIENT),
    (OSError("no route to host"), Fault.TRANSIENT),
    (sa.TimeoutError("pool"), Fault.TRANSIENT),
    (asyncpg.InterfaceError("connection is closed"), Fault.TRANSIENT),
    (asyncpg.ConnectionDoesNotExistError("connection was closed"), Fault.TRANSIENT),
    (asyncpg.DeadlockDetectedError("deadlock detected"), Fault.TRANSIENT),
    (asyncpg.CannotConnectNowError("starting up"), Fault.TRANSIENT),
    (asyncpg.UniqueViolationError("duplicate key"), Fault.UNKNOWN),
    (asyncpg.StringDataRightTruncationError("too long"), Fault.UNKNOWN),
    (aiormq.exceptions.AMQPConnectionError(), Fault.TRANSIENT),
    (aiormq.exceptions.ChannelClosed(), Fault.TRANSIENT),
    (asyncio.IncompleteReadError(b"", 1), Fault.TRANSIENT),
    (database_error(ValueError("x"), invalidated=True), Fault.TRANSIENT),
    (database_error(ValueError("x")), Fault.UNKNOWN),
    (failed(database_error(asyncpg.SerializationError("x"))), Fault.TRANSIENT),
    (failed(failed(TimeoutError())), Fault.TRANSIENT),
    (caused(database_error(ValueError("x")), ConnectionResetError()), Fault.UNKNOWN),
    (Coded(None), Fault.UNKNOWN),
    (Coded(57014), Fault.UNKNOWN),
    (Coded(""), Fault.UNKNOWN),
    (ValueError("a bug"), Fault.UNKNOWN),
    (KeyError("a bug"), Fault.UNKNOWN),
    (AssertionError(), Fault.UNKNOWN),
    (MemoryError(), Fault.UNKNOWN),
]  # fmt: skip


def name(value: object) -> str:
    return f"{type(value).__name__}: {one_line(value, 40)}" if isinstance(value, BaseException) else str(value)


@pytest.mark.parametrize(("error", "fault"), FAULTS, ids=name)
def test_every_error_is_classified(error: BaseException, fault: Fault):
    assert fault_of(error) is fault
    assert lies_in_data(error) is (fault is Fault.UNKNOWN)


def test_the_nearest_server_error_decides_the_classification():
    constraint = caused(database_error(Coded("23505")), ConnectionResetError())
    assert fault_of(failed(constraint)) is Fault.UNKNOWN


def test_errors_that_are_each_others_cause_are_visited_once():
    first, second = RuntimeError("a"), RuntimeError("b")
    first.__cause__, second.__cause__ = second, first
    assert fault_of(first) is Fault.UNKNOWN


def settled(error: BaseException, *, attempts: int = 0, max_attempts: int = 5) -> Settlement:
    return settle(Failed(error), attempts=attempts, max_attempts=max_attempts)


def result(state: Any) -> TransactionResult:
    difference = "status: stored failed, found succeeded" if state == "conflict" else None
    return TransactionResult("acme", uuid4(), state, TransactionPhase.COMMITTED, difference=difference)


@pytest.mark.parametrize("attempts", [0, 4, 5, 99])
@pytest.mark.parametrize(
    ("state", "settlement"),
    [
        ("committed", lambda _: Ack("committed")),
        ("duplicate", lambda _: Ack("duplicate")),
        (
            "conflict",
            lambda attempts: Park(
                "conflicting_duplicate",
                "this run was already closed out from a message with different content; the stored run is unchanged: "
                "status: stored failed, found succeeded",
                attempts,
            ),
        ),
        ("unfinished", lambda attempts: RetryLater(attempts, "a legacy close-out of this run is unfinished")),
    ],
)
def test_the_state_of_an_outcome_decides_its_settlement(state: str, settlement: Any, attempts: int):
    assert settle(result(state), attempts=attempts, max_attempts=5) == settlement(attempts)


@pytest.mark.parametrize("reason", get_args(ParkReason))
@pytest.mark.parametrize("attempts", [0, 7])
def test_an_error_of_the_sender_is_parked_immediately_with_its_reason(reason: ParkReason, attempts: int):
    error = MessageRefusedError(reason, "status: found 5; expected one of …")
    assert settled(error, attempts=attempts) == Park(reason, "status: found 5; expected one of …", attempts)


def test_a_refusal_inside_a_failed_transaction_keeps_its_reason():
    parked = settled(failed(MessageRefusedError("conflicting_duplicate", "different content")))
    assert isinstance(parked, Park)
    assert parked.reason == "conflicting_duplicate"


@pytest.mark.parametrize("attempts", [0, 4, 1000])
def test_a_transient_error_is_never_counted_and_never_parks(attempts: int):
    assert settled(UnavailableError("no answer"), attempts=attempts) == PauseAndRequeue("no answer")
    assert isinstance(settled(failed(database_error(Coded("57P01"))), attempts=attempts), PauseAndRequeue)


def test_a_missing_privilege_is_transient_and_refers_to_closeout_doctor():
    settlement = settled(failed(database_error(Coded("42501"))), attempts=0)
    assert isinstance(settlement, PauseAndRequeue)
    assert settlement.why.startswith("PostgreSQL: ")
    assert settlement.why.endswith("; closeout doctor names the privilege")


@pytest.mark.parametrize(
    ("attempts", "max_attempts", "settlement"),
    [
        (0, 5, RetryLater(1, "a bug")),
        (3, 5, RetryLater(4, "a bug")),
        (4, 5, Park("attempts_exhausted", "a bug", 5)),
        (5, 5, Park("attempts_exhausted", "a bug", 6)),
        (0, 1, Park("attempts_exhausted", "a bug", 1)),
        (0, 2, RetryLater(1, "a bug")),
    ],
)
def test_an_unknown_error_is_retried_a_bounded_number_of_times_then_parked(
    attempts: int, max_attempts: int, settlement: Settlement
):
    assert settled(ValueError("a bug"), attempts=attempts, max_attempts=max_attempts) == settlement


def test_a_failing_delivery_is_parked_after_exactly_the_maximum_of_attempts():
    attempts = tries = 0
    while True:
        tries += 1
        settlement = settled(ValueError("a bug"), attempts=attempts, max_attempts=5)
        if isinstance(settlement, Park):
            break
        assert isinstance(settlement, RetryLater)
        attempts = settlement.attempts
    assert (tries, settlement.attempts) == (5, 5)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("two\nlines\t and  spaces"), "two lines and spaces"),
        (ValueError(), "ValueError"),
        (ValueError(" \n"), "ValueError"),
        (database_error(asyncpg.UniqueViolationError("duplicate key")), "duplicate key"),
        (ValueError("x" * 500), "x" * 500),
        (ValueError("x" * 501), "x" * 499 + "…"),
    ],
    ids=name,
)
def test_an_error_is_one_short_line_without_the_statement_and_its_parameters(error: BaseException, words: str):
    assert one_line(error) == words


def test_a_failed_transaction_reports_phase_and_cause_without_run_data():
    error = failed(database_error(asyncpg.CheckViolationError("check failed")))
    assert str(error) == "rolled back at INCIDENT_CREATED: DBAPIError: check failed"
    assert "secret" not in str(error)


def test_the_row_that_postgresql_refused_is_not_quoted():
    error = asyncpg.CheckViolationError('new row for relation "incidents" violates check constraint "unforeseen"')
    error.detail, error.hint = "Failing row contains (acme, the customer's own words).", None
    assert "own words" in str(error)

    assert one_line(error) == 'new row for relation "incidents" violates check constraint "unforeseen"'
    failed = TransactionFailed(
        phase=TransactionPhase.NOT_STARTED, results=(), operations=(), rolled_back=True, cause=error
    )
    assert "own words" not in str(failed)
