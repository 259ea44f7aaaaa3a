"""Values from senders as pages show them."""

from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest

from consumer.console.formatting import (
    ago,
    moment,
    names_run,
    number,
    rate,
    run_path,
    shown,
    span,
    when,
)

RUN = UUID("01890a5d-ac96-774b-bcce-b302099a8057")


@pytest.mark.parametrize(
    ("written", "on_the_page"),
    [
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        ("\" onmouseover='x'", "&#34; onmouseover=&#39;x&#39;"),
        ("&lt;b&gt;", "&amp;lt;b&amp;gt;"),
        ("a\u202eb", 'a<span class="odd">U+202E</span>b'),
        ("\x1b[31m", '<span class="odd">U+001B</span>[31m'),
        ("line one\n\tline two", "line one\n\tline two"),
        ("שלום 👩‍🚀 naïve", "שלום 👩‍🚀 naïve"),  # right-to-left text is unmodified
        (True, "yes"),
        ({"a": "<b>"}, "{&#34;a&#34;: &#34;&lt;b&gt;&#34;}"),
    ],
)
def test_a_value_is_escaped_and_isolated_and_bidi_controls_are_visible(written, on_the_page):
    assert shown(written) == f"<bdi>{on_the_page}</bdi>"


def test_a_long_value_is_truncated_with_its_full_length():
    words = shown("<" * 1_048_576, 2_000)
    assert words.count("&lt;") == 2_000
    assert "cut: the first 2,000 of 1,048,576 characters" in words


def test_null_and_empty_text_are_distinguished():
    assert "none" in shown(None)
    assert "empty" in shown("")


def test_the_path_of_a_run_is_percent_encoded():
    assert run_path("acme", RUN) == f"/runs/acme/{RUN}"
    assert run_path("javascript:alert(1)//", "?x") == "/runs/javascript%3Aalert%281%29%2F%2F/%3Fx"


@pytest.mark.parametrize("tenant", [".", ".."])
def test_a_tenant_or_run_named_like_a_relative_path_is_linked_through_the_search(tenant):
    assert run_path(tenant, RUN) == f"/runs?q={tenant}%2F{RUN}"
    assert run_path("acme", tenant) == f"/runs?q=acme%2F{tenant}"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 ms"), (0.0004, "0.4 ms"), (0.0123, "12 ms"), (0.9994, "999 ms"), (0.9996, "1.0 s"), (1, "1 s"),
        (2.34, "2.3 s"), (42.4, "42 s"), (59.96, "1 min"), (60, "1 min"), (125, "2 min 5 s"), (3_600, "1 h"),
        (11_040, "3 h 4 min"), (200_000, "2 d 7 h"), (-2, "-2 s"), (None, "-"),
    ],
)  # fmt: skip
def test_a_duration_is_formatted_in_readable_units(seconds, words):
    assert span(seconds) == words


def test_times_are_utc_and_ages_are_relative():
    at = datetime(2026, 11, 1, 13, 0, 0, 123_456, tzinfo=UTC).astimezone()
    assert moment(at) == "2026-11-01 13:00:00.123Z"
    assert ago(at, at + timedelta(seconds=75.9)) == "1 min 15 s ago"
    assert ago(at, at - timedelta(seconds=3)) == "now"


def test_a_time_of_another_day_has_its_date():
    at = datetime(2026, 11, 1, 23, 59, 58, tzinfo=UTC)
    assert when(at, at + timedelta(seconds=1)) == "23:59:58"
    assert when(at, at + timedelta(seconds=2)) == "11-01 23:59"


def test_counts_and_rates_are_formatted():
    assert number(1_234_567) == "1,234,567"
    assert [rate(pace) for pace in (0, 0.42, 9.94, 9.96, 1_530.4, None)] == ["0", "0.4", "9.9", "10", "1,530", "-"]


def test_a_search_is_parsed_into_a_run_or_rejected():
    assert names_run("acme", str(RUN))
    assert not names_run("no spaces", str(RUN))
    assert names_run("acme", "run/17")
    assert not names_run("acme", "not an id")
    assert not names_run(None, str(RUN))
    assert not names_run("a" * 129, str(RUN))
    assert not names_run("acme\n", str(RUN))
