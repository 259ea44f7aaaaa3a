"""Formats values for pages. Text from senders is escaped and cannot hide or reorder text around it."""

import json
import re
from datetime import UTC, datetime
from urllib.parse import quote

from markupsafe import Markup, escape

from consumer.contract.scalars import is_tenant_id, run_id_of

# Characters of one value on a page; the command line prints all.
SHOWN_CHARACTERS = 2_000
# Control characters, and characters that change the direction of text, which can make a name read as another one. Not
# right-to-left letters, and not the joiners of emoji.
_ODD = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
_DOTS = re.compile(r"\.{1,2}")


def shown(value: object, limit: int = SHOWN_CHARACTERS) -> Markup:
    """Return *value* as text for a page: escaped, isolated in direction, and cut with a note."""
    if value is None:
        return Markup('<span class="none">none</span>')
    text = value if isinstance(value, str) else _plain(value)
    if not text:
        return Markup('<span class="none">empty</span>')
    text_markup = Markup("").join(_pieces(text[:limit]))
    if len(text) > limit:
        note = f"… cut: the first {limit:,} of {len(text):,} characters"
        text_markup += Markup('<span class="note">{}</span>').format(note)
    return Markup("<bdi>{}</bdi>").format(text_markup)


def _pieces(text: str) -> list[Markup]:
    pieces, end = [], 0
    for found in _ODD.finditer(text):
        mark = Markup('<span class="odd">U+{}</span>').format(f"{ord(found.group()):04X}")
        pieces += [escape(text[end : found.start()]), mark]
        end = found.end()
    return [*pieces, escape(text[end:])]


def _plain(value: object) -> str:
    if isinstance(value, datetime):
        return moment(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def run_path(tenant_id: object, run_id: object) -> str:
    """Return the address of a run's page.

    A browser resolves ``.`` and ``..`` in a path, in any encoding; such runs are linked through the search.
    """
    if _DOTS.fullmatch(str(tenant_id)) or _DOTS.fullmatch(str(run_id)):
        return f"/runs?q={quote(f'{tenant_id}/{run_id}', safe='')}"
    return f"/runs/{quote(str(tenant_id), safe='')}/{quote(str(run_id), safe='')}"


def names_run(tenant_id: str | None, run_id: str | None) -> bool:
    """Return whether these are a valid run's key, which has a page."""
    return is_tenant_id(tenant_id or "") and run_id_of(tenant_id or "", run_id or "") is not None


def moment(at: datetime | None) -> str:
    """Return a time to the millisecond, UTC."""
    return "-" if at is None else f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S.%f}"[:-3] + "Z"


def clock(at: datetime | None) -> str:
    """Return a time of the day, UTC."""
    return "-" if at is None else f"{at.astimezone(UTC):%H:%M:%S}"


def when(at: datetime, now: datetime) -> str:
    """Return a time of the day, UTC; on another day than *now*, month and day instead of the seconds."""
    at = at.astimezone(UTC)
    return f"{at:%H:%M:%S}" if at.date() == now.astimezone(UTC).date() else f"{at:%m-%d %H:%M}"


def instant(at: datetime | None) -> str:
    """Return a time of the day to the millisecond, UTC."""
    return "-" if at is None else f"{at.astimezone(UTC):%H:%M:%S.%f}"[:-3]


def day(at: datetime) -> str:
    """Return a date, UTC."""
    return f"{at.astimezone(UTC):%Y-%m-%d}"


def stamp(at: datetime | None) -> str:
    """Return a time in ISO 8601."""
    return "" if at is None else at.astimezone(UTC).isoformat(timespec="milliseconds")


def ago(at: datetime | None, now: datetime) -> str:
    """Return the time between *at* and *now*, to the second."""
    if at is None:
        return "-"
    seconds = (now - at).total_seconds()
    return "now" if seconds < 1 else f"{span(float(int(seconds)))} ago"


_UNITS = ((86_400, "d", 3_600, "h"), (3_600, "h", 60, "min"), (60, "min", 1, "s"))


def span(seconds: float | None) -> str:
    """Return a duration in suitable units, two at most."""
    if seconds is None:
        return "-"
    if seconds < 0:
        return f"-{span(-seconds)}"
    if seconds < 0.9995:
        milliseconds = seconds * 1_000
        return f"{milliseconds:.0f} ms" if milliseconds >= 9.95 or not milliseconds else f"{milliseconds:.1f} ms"
    if seconds < 59.95:
        return f"{seconds:.0f} s" if seconds >= 9.95 or seconds == int(seconds) else f"{seconds:.1f} s"
    for unit, name, part, part_name in _UNITS:
        if seconds >= unit:
            whole, rest = divmod(int(seconds), unit)
            return f"{whole} {name} {rest // part} {part_name}" if rest // part else f"{whole} {name}"
    return "1 min"  # between 59.95 s and a minute


def number(value: float | None) -> str:
    """Return a count with thousands separators."""
    return "-" if value is None else f"{value:,.0f}"


def rate(per_second: float | None) -> str:
    """Return a rate per second, with a decimal if it is low."""
    if per_second is None:
        return "-"
    return f"{per_second:,.0f}" if per_second >= 9.95 or not per_second else f"{per_second:.1f}"


def money(dollars: object) -> str:
    """Return US dollars with all stored digits."""
    return "-" if dollars is None else f"${dollars}"
