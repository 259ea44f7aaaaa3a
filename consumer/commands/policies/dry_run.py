"""``closeout policies test``: which conditions hold over a run, and why."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple
from uuid import UUID

import typer
from sqlalchemy.ext.asyncio import AsyncEngine

from consumer.commands.output import EXIT_USAGE, fail, print_json
from consumer.commands.policies.dry_run_view import show
from consumer.commands.policies.files import PolicyFile, drafts_in
from consumer.commands.session import settings_for, with_database
from consumer.contract.refusals import MessageRefusedError
from consumer.contract.run_message import decode
from consumer.policy_analysis.dry_run import Verdict, try_policies
from consumer.runs.stored import StoredRun, read_runs, reading
from domains.policies.files import PolicyDraft
from domains.run import CompletedRun, RunKey


class Expectation(NamedTuple):
    """A policy that must hold, or must not, and whether it is so."""

    policy: str
    expected: str
    found: str
    met: bool


def try_file(
    file: PolicyFile,
    *,
    run: Annotated[
        str,
        typer.Option(
            metavar="RUN",
            help="A run-completed message in a file of JSON, - for standard input; or a stored TENANT/RUN_ID.",
        ),
    ],
    expect: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Exit 1 unless this policy holds; may be repeated.")
    ] = None,
    expect_not: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Exit 1 unless this policy does not hold.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Hold the policies of FILE against one run, as if they alone were in force; say which hold, and why.

    Changes nothing, and needs no server but for a stored run. Of each condition
    the parts that && and || join are shown with their truth, and the values that
    it read. Exit 0 whether policies hold or not, unless --expect or --expect-not
    says otherwise: for tests of policies in CI. NAME may be TENANT/NAME where two
    policies have one name.

    Example: closeout policies test policies.yaml --run run.json --expect costly
    """
    if str(file) == run == "-":
        fail("FILE and --run: both are -; expected one of them on standard input", status=EXIT_USAGE)
    drafts = drafts_in(file)
    expected = [(name, "holds") for name in expect or ()] + [(name, "does_not_hold") for name in expect_not or ()]
    for name, wanted in expected:
        _check_name(name, drafts, option="--expect" if wanted == "holds" else "--expect-not")
    decoded, unknown = _read(run)
    trial = try_policies(drafts, decoded, unknown=unknown)
    expectations = [_compare(name, wanted, trial.policies) for name, wanted in expected]
    if as_json:
        print_json({"trial": trial, "expectations": [one._asdict() for one in expectations]})
    else:
        show(trial)
    unmet = [one for one in expectations if not one.met]
    if unmet:
        fail(
            "\n".join(f"{one.policy}: expected that it {_words(one.expected)}; it {_words(one.found)}" for one in unmet)
        )


def _read(run: str) -> tuple[CompletedRun, frozenset[str]]:
    """Return the run that *run* names and which of its fields are not known; end where it is none."""
    key = _key(run)
    if key is not None and not Path(run).exists():
        return _stored(key)
    max_bytes = settings_for(need_amqp=False, need_database=False).message_max_bytes
    try:
        body = sys.stdin.buffer.read() if run == "-" else Path(run).read_bytes()
        return decode(body, max_bytes=max_bytes).run, frozenset()
    except OSError as error:
        fail(f"--run: cannot read {run}: {error.strerror}; expected a file, or TENANT/RUN_ID", status=EXIT_USAGE)
    except MessageRefusedError as error:
        fail(f"{run}: a worker would park this message, {error.reason}: {error}")


def _key(run: str) -> RunKey | None:
    tenant, _, run_id = run.rpartition("/")
    try:
        return RunKey(tenant, UUID(run_id)) if tenant else None
    except ValueError:
        return None


def _stored(key: RunKey) -> tuple[CompletedRun, frozenset[str]]:
    async def work(engine: AsyncEngine) -> list[StoredRun]:
        async with reading(engine) as conn:
            return await read_runs(conn, [key])

    found = with_database(work)
    if not found:
        fail(f"--run: no run {key.tenant_id}/{key.run_id} is stored, and there is no such file")
    return found[0].run, found[0].unknown


def _check_name(name: str, drafts: Sequence[PolicyDraft], *, option: str) -> None:
    known = {draft.name for draft in drafts} | {f"{draft.tenant_id}/{draft.name}" for draft in drafts}
    if name not in known:
        names = ", ".join(draft.name for draft in drafts) or "none"
        fail(f"{option}: found {name!r}; expected one of the file's policies: {names}", status=EXIT_USAGE)


def _compare(name: str, expected: str, verdicts: Sequence[Verdict]) -> Expectation:
    """Compare with the policies of that name; of several, the run's tenant's own and the one for all, any may hold."""
    results = {v.result for v in verdicts if name in {v.name, f"{v.tenant_id}/{v.name}"}}
    asked = results - {"other_tenant", "off"} or results
    found = "holds" if "holds" in asked else min(asked - {"does_not_hold"}, default="does_not_hold")
    return Expectation(name, expected, found, found == expected)


_SAID = {
    "holds": "holds",
    "does_not_hold": "does not hold",
    "error": "fails to evaluate",
    "unknown": "depends on what is not stored of the run",
    "other_tenant": "is another tenant's",
    "off": "is off in the file",
}


def _words(result: str) -> str:
    return _SAID[result]
