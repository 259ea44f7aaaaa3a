"""What policies would have done, and what policies in shadow have caught, as a person reads it."""

from collections.abc import Sequence
from datetime import UTC, datetime

import msgspec
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from consumer.commands.output import out
from consumer.policy_analysis.backtest import Backtest, Count, Example, Tally
from consumer.wording import counted
from domains.policies.explain import Value
from domains.policies.files import PolicyDraft

# Tenants of a policy that are named, those with most hits first.
_TENANTS_SHOWN = 20
# Columns from which on a tenant's numbers stand in a table; below it some would be cut.
_TABLE_WIDTH = 80
# Characters of a value in an example's line.
_VALUE_MAX = 60
_WOULD = {"flag": "would flag", "suppress_incident": "would suppress"}
_KINDS = (("newly", "newly"), ("again", "as before"), ("no_longer", "no longer"), ("errors", "error"))


def show(result: Backtest, *, off: Sequence[str], limit: int) -> None:
    """Print each policy with its numbers by tenant and its examples."""
    line(f"{counted(result.runs, 'run')}, received {moment(result.since)} to {moment(result.until)}")
    did = result.in_force
    line(
        f"The policies in force flagged {did.flagged:,}, suppressed {counted(did.suppressed, 'incident')} and failed "
        f"to evaluate over {did.errors:,}"
    )
    for tally in result.tallies:
        line("")
        policy(tally, limit)
    for name in off:
        line("")
        line(f"{name}: off in the file (enabled: false), not looked at")
    if any(tally.total.unknown for tally in result.tallies):
        line("")
        line(
            "unknown: the answer depends on what is not stored, the error message of a run whose incident was "
            "suppressed, or the steps or trace id of one that was not traced",
            "yellow",
        )
    if any(examples for tally in result.tallies for examples in tally.examples.values()):
        line("")
        line("Why: closeout policies test FILE --run TENANT/RUN_ID", "dim")


def policy(tally: Tally, limit: int) -> None:
    """Print what one policy would have done, by tenant, with examples."""
    draft, total = tally.draft, tally.total
    share = f" ({total.hits / total.runs:.1%})" if total.runs else ""
    line(f"{about(draft)}: {_WOULD[draft.effect]} {total.hits:,} of {counted(total.runs, 'run')}{share}", "bold")
    if tally.has_history:
        line(f"  against what policies of this name did: {total.newly:,} newly, {total.no_longer:,} no longer")
    else:
        line("  no policy of this name has decided anything: all of these are new")
    if total.runs:
        _by_tenant(tally)
    examples(tally.examples, limit)


def _by_tenant(tally: Tally) -> None:
    names = ("runs", _WOULD[tally.draft.effect], "newly", "no longer", "errors", "unknown")
    # A name may be longer than its column, never cut: two tenants may begin alike.
    numbers = (Column(name, justify="right", no_wrap=True) for name in names)
    table = Table(Column("  tenant", overflow="fold", min_width=12), *numbers, box=None)
    ranked = sorted(tally.tenants.items(), key=lambda item: (-item[1].hits, item[0]))
    for name, count in ranked[:_TENANTS_SHOWN]:
        if out.width < _TABLE_WIDTH:
            said = (f"{heading} {cell}" for heading, cell in zip(names, _cells(count), strict=True))
            line(f"  {name}")
            out.print(Padding(Text(", ".join(said)), (0, 0, 0, 4)))
        table.add_row(Text(f"  {name}"), *_cells(count))
    if out.width >= _TABLE_WIDTH:
        out.print(table)
    if len(ranked) > _TENANTS_SHOWN:
        line(f"  and {counted(len(ranked) - _TENANTS_SHOWN, 'more tenant')} (--json has all)")


def _cells(count: Count) -> list[str]:
    numbers = (count.runs, count.hits, count.newly, count.no_longer, count.errors, count.unknown)
    return [f"{number:,}" for number in numbers]


def examples(found: dict[str, list[Example]], limit: int) -> None:
    """Print the examples of each kind; of hits that were hits before only as many as others leave room for."""
    for kind, words in _KINDS:
        of_kind = found.get(kind, [])
        if kind == "again":
            of_kind = of_kind[: max(0, limit - len(found.get("newly", [])))]
        for example in of_kind:
            line(f"  {words:<10}{in_words(example)}")


def in_words(example: Example) -> str:
    """Return an example on one line: the run, how it ended, and what the condition read."""
    code = f" {example.error_code}" if example.error_code else ""
    said = f"{example.tenant_id}/{example.run_id}  {moment(example.completed_at)} {example.status}{code}"
    return "  ".join([said, *map(_value, example.values), *([example.error] if example.error else [])])


def about(draft: PolicyDraft) -> str:
    """Return a policy's name, effect and owner."""
    return f"{draft.name} ({draft.effect} {draft.severity}, {owner(draft.tenant_id)})"


def owner(tenant_id: str | None) -> str:
    """Return whose a policy is."""
    return f"tenant {tenant_id}" if tenant_id else "all tenants"


def _value(value: Value) -> str:
    if value.state != "known":
        return f"{value.path} is {'not there' if value.state == 'missing' else 'not stored'}"
    words = msgspec.json.encode(value.value).decode()
    return f"{value.path} = {words if len(words) <= _VALUE_MAX else words[:_VALUE_MAX] + '…'}"


def moment(at: datetime) -> str:
    """Return a time as people read it."""
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S}Z"


def line(words: str, style: str = "") -> None:
    """Print *words* on one line, however long."""
    out.print(Text(words, style=style), soft_wrap=True)
