"""Evaluates the policies of a file on one run."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sqlalchemy.ext.asyncio import AsyncEngine

from consumer.commands.output import EXIT_USAGE, fail, print_json
from consumer.commands.policies.dry_run_view import print_dry_run
from consumer.commands.policies.files import drafts_in
from consumer.commands.session import settings_for, with_database
from consumer.contract.refusals import MessageRefusedError
from consumer.contract.run_message import decode
from consumer.contract.scalars import is_tenant_id, run_id_of
from consumer.policy_analysis.dry_run import Verdict, dry_run
from consumer.runs.stored import StoredRun, read_runs, reading
from domains.policies.files import PolicyDraft
from domains.run import CompletedRun, RunKey


class Expectation(NamedTuple):
    """An expectation that a policy's condition holds or does not hold, and whether it was met."""

    policy: str
    expected: str
    found: str
    met: bool


def test_file(file: Path, *, run: str, expect: Sequence[str], expect_not: Sequence[str], as_json: bool) -> None:
    """Evaluate the policies in *file* on one run; end with status 1 if an expectation is not met."""
    if str(file) == run == "-":
        fail("FILE and --run: both are -; expected only one on standard input", status=EXIT_USAGE)
    drafts = drafts_in(file)
    expected = [(name, "holds") for name in expect] + [(name, "does_not_hold") for name in expect_not]
    for name, wanted in expected:
        _check_name(name, drafts, option="--expect" if wanted == "holds" else "--expect-not")
    decoded, unknown = _read(run)
    result = dry_run(drafts, decoded, unknown=unknown)
    expectations = [_compare(name, wanted, result.policies) for name, wanted in expected]
    if as_json:
        print_json({"trial": result, "expectations": [one._asdict() for one in expectations]})
    else:
        print_dry_run(result)
    unmet = [one for one in expectations if not one.met]
    if unmet:
        fail("\n".join(f"{one.policy}: expected: {_TEXTS[one.expected]}; found: {_TEXTS[one.found]}" for one in unmet))


def _read(run: str) -> tuple[CompletedRun, frozenset[str]]:
    """Return the run that *run* names, and its unknown fields; exit with an error if the run cannot be read."""
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
        fail(f"{run}: a worker would park this message: {error.reason}: {error}")


def _key(run: str) -> RunKey | None:
    tenant, _, text = run.partition("/")
    found = run_id_of(tenant, text) if is_tenant_id(tenant) else None
    return RunKey(tenant, found[0]) if found else None


def _stored(key: RunKey) -> tuple[CompletedRun, frozenset[str]]:
    async def work(engine: AsyncEngine) -> list[StoredRun]:
        async with reading(engine) as conn:
            return await read_runs(conn, [key])

    found = with_database(work)
    if not found:
        fail(f"--run: run {key.tenant_id}/{key.run_id} is not stored, and there is no such file")
    return found[0].run, found[0].unknown


def _check_name(name: str, drafts: Sequence[PolicyDraft], *, option: str) -> None:
    known = {draft.name for draft in drafts} | {f"{draft.tenant_id}/{draft.name}" for draft in drafts}
    if name not in known:
        names = ", ".join(draft.name for draft in drafts) or "none"
        fail(f"{option}: found {name!r}; expected one of the file's policies: {names}", status=EXIT_USAGE)


def _compare(name: str, expected: str, verdicts: Sequence[Verdict]) -> Expectation:
    """Compare with the policies called *name*. The tenant's policy or the one for all tenants may hold."""
    results = {v.result for v in verdicts if name in {v.name, f"{v.tenant_id}/{v.name}"}}
    evaluated = results - {"other_tenant", "off"} or results
    found = "holds" if "holds" in evaluated else min(evaluated - {"does_not_hold"}, default="does_not_hold")
    return Expectation(name, expected, found, found == expected)


_TEXTS = {
    "holds": "holds",
    "does_not_hold": "does not hold",
    "error": "fails to evaluate",
    "unknown": "depends on data that is not stored",
    "other_tenant": "belongs to another tenant",
    "off": "is off in the file",
}
