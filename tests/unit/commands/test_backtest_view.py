"""The output of ``closeout policies backtest`` and ``shadow`` at a width of 80 columns."""

import re
from io import StringIO

import pytest
from rich.console import Console

from consumer.commands.policies import backtest_view as screen
from consumer.policy_analysis.tally import Count, Tally
from domains.policies.cel.conditions import Condition
from domains.policies.files import PolicyDraft


@pytest.mark.parametrize("effect", ["flag", "suppress_incident"])
def test_tenants_with_a_common_prefix_are_shown_with_full_names(monkeypatch, effect):
    printed = StringIO()
    monkeypatch.setattr(screen, "out", Console(file=printed, width=80, highlight=False))
    alike = "a" * 120
    draft = PolicyDraft(tenant_id=None, name="dear", effect=effect, severity="LOW", condition="true")
    counts = {f"{alike}-{name}": Count(runs=1_000_000) for name in ("east", "west")}

    screen.print_policy(Tally(draft, Condition("true"), has_history=True, tenants=counts), limit=0)

    names = "".join(re.findall(r"^ *([a-z-]+) ", printed.getvalue(), re.MULTILINE))
    assert (f"{alike}-east" in names, f"{alike}-west" in names) == (True, True)
    assert "…" not in printed.getvalue()


@pytest.mark.parametrize("width", [40, 79])
def test_a_narrow_screen_does_not_truncate_numbers_or_words(monkeypatch, width):
    printed = StringIO()
    monkeypatch.setattr(screen, "out", Console(file=printed, width=width, highlight=False))
    draft = PolicyDraft(tenant_id=None, name="dear", effect="suppress_incident", severity="LOW", condition="true")
    counts = {"acme": Count(runs=1_234_567, hits=7, unknown=3), "globex": Count(runs=2)}

    screen.print_policy(Tally(draft, Condition("true"), has_history=True, tenants=counts), limit=0)

    output = " ".join(printed.getvalue().split())
    assert "acme runs 1,234,567, would suppress 7, newly 0, no longer 0, errors 0, unknown 3 globex runs 2," in output
