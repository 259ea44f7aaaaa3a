"""Formats the results of backtests and shadow policies."""

from collections.abc import Sequence

import msgspec
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from consumer.commands.output import format_time, out
from consumer.policy_analysis.backtest import Backtest
from consumer.policy_analysis.tally import Count, Example, Tally, share_between
from consumer.wording import counted
from domains.policies.explain import Value
from domains.policies.files import PolicyDraft

# Tenants that are listed per policy, those with most hits first.
_TENANTS_LISTED = 20
# Terminal columns from which a tenant's numbers are printed as a table.
_TABLE_WIDTH = 80
# Characters of a value in an example's line.
_VALUE_MAX = 60
_WOULD = {"flag": "would flag", "suppress_incident": "would suppress"}
_KINDS = (("newly", "newly"), ("again", "as before"), ("no_longer", "no longer"), ("errors", "error"))


def print_backtest(result: Backtest, *, off: Sequence[str], limit: int) -> None:
    """Print each policy with its numbers by tenant and its examples."""
    print_one(f"{counted(result.runs, 'run')}, received {format_time(result.since)} to {format_time(result.until)}")
    did = result.in_force
    print_one(
        f"The enforced policies flagged {did.flagged:,}, suppressed {counted(did.suppressed, 'incident')} and failed "
        f"to evaluate on {did.errors:,}"
    )
    if result.sample_of is not None:
        print_one(
            f"A random sample of about {result.sample_of:,} runs: shares in brackets are those of all of them, with a "
            "confidence of 95%",
            "yellow",
        )
    for tally in result.tallies:
        print_one("")
        print_policy(tally, limit, is_sample=result.sample_of is not None)
    for name in off:
        print_one("")
        print_one(f"{name}: off in the file (enabled: false), not evaluated")
    if any(tally.total.unknown for tally in result.tallies):
        print_one("")
        print_one(
            "unknown: the result depends on data that is not stored: the error message of a run whose incident was "
            "suppressed, or the steps or trace id of a run without a trace",
            "yellow",
        )
    if any(examples for tally in result.tallies for examples in tally.examples.values()):
        print_one("")
        print_one("Why: closeout policies test FILE --run TENANT/RUN_ID", "dim")


def print_policy(tally: Tally, limit: int, *, is_sample: bool = False) -> None:
    """Print the results of one policy, by tenant, with examples."""
    draft, total = tally.draft, tally.total
    share = f" ({total.hits / total.runs:.1%})" if total.runs else ""
    if is_sample:
        low, high = share_between(total.hits, total.runs)
        share += f" [{low:.1%} to {high:.1%}]"
    print_one(f"{about(draft)}: {_WOULD[draft.effect]} {total.hits:,} of {counted(total.runs, 'run')}{share}", "bold")
    if tally.has_history:
        print_one(
            f"  compared with enforced policies of this name: {total.newly:,} newly, {total.no_longer:,} no longer"
        )
    else:
        print_one("  no policy of this name has been enforced: all of these are new")
    if total.runs:
        _by_tenant(tally)
    examples(tally.examples, limit)


def _by_tenant(tally: Tally) -> None:
    names = ("runs", _WOULD[tally.draft.effect], "newly", "no longer", "errors", "unknown")
    # Never cut: two tenants' names may start alike.
    numbers = (Column(name, justify="right", no_wrap=True) for name in names)
    table = Table(Column("  tenant", overflow="fold", min_width=12), *numbers, box=None)
    ranked = sorted(tally.tenants.items(), key=lambda item: (-item[1].hits, item[0]))
    for name, count in ranked[:_TENANTS_LISTED]:
        if out.width < _TABLE_WIDTH:
            parts = (f"{heading} {cell}" for heading, cell in zip(names, _cells(count), strict=True))
            print_one(f"  {name}")
            out.print(Padding(Text(", ".join(parts)), (0, 0, 0, 4)))
        table.add_row(Text(f"  {name}"), *_cells(count))
    if out.width >= _TABLE_WIDTH:
        out.print(table)
    if len(ranked) > _TENANTS_LISTED:
        print_one(f"  and {counted(len(ranked) - _TENANTS_LISTED, 'more tenant')} (--json has all)")


def _cells(count: Count) -> list[str]:
    numbers = (count.runs, count.hits, count.newly, count.no_longer, count.errors, count.unknown)
    return [f"{number:,}" for number in numbers]


def examples(found: dict[str, list[Example]], limit: int) -> None:
    """Print up to *limit* examples per kind; unchanged hits only as far as new ones leave room."""
    for kind, label in _KINDS:
        of_kind = found.get(kind, [])
        if kind == "again":
            of_kind = of_kind[: max(0, limit - len(found.get("newly", [])))]
        for example in of_kind:
            print_one(f"  {label:<10}{describe_example(example)}")


def describe_example(example: Example) -> str:
    """Return an example on one line: the run, its outcome, and the values that the condition read."""
    code = f" {example.error_code}" if example.error_code else ""
    text = f"{example.tenant_id}/{example.run_id}  {format_time(example.completed_at)} {example.status}{code}"
    return "  ".join([text, *map(_value, example.values), *([example.error] if example.error else [])])


def about(draft: PolicyDraft) -> str:
    """Return a policy's name, effect and owner."""
    return f"{draft.name} ({draft.effect} {draft.severity}, {owner(draft.tenant_id)})"


def owner(tenant_id: str | None) -> str:
    """Return the tenant or tenants that a policy applies to."""
    return f"tenant {tenant_id}" if tenant_id else "all tenants"


def _value(value: Value) -> str:
    if value.state != "known":
        return f"{value.path} is {'missing' if value.state == 'missing' else 'not stored'}"
    text = msgspec.json.encode(value.value).decode()
    return f"{value.path} = {text if len(text) <= _VALUE_MAX else text[:_VALUE_MAX] + '…'}"


def print_one(line: str, style: str = "") -> None:
    """Print *line* without wrapping it."""
    out.print(Text(line, style=style), soft_wrap=True)
