"""A run as conditions see it: as CEL values, with long texts and long lists of steps cut."""

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
from cel_expr_python import cel

from domains.policies.cel.field_paths import Path
from domains.policies.cel.sizes import STEP_TEXTS, TEXT_MAX_BYTES, Extent, extent_of
from domains.run import VISIBLE_STEPS, CompletedRun, Step

# Characters of each string that conditions see: an error message may have a megabyte, and a condition may match it
# 10,000 times. UTF-8 has at most four bytes per character.
VISIBLE_MAX = TEXT_MAX_BYTES // 4
_INT64 = range(-(2**63), 2**63)
# The library treats the ends of Python's calendar as infinite, and rounds the last second out of it.
_EARLIEST = datetime.min.replace(tzinfo=UTC) + timedelta(microseconds=1)
_LATEST = datetime.max.replace(tzinfo=UTC, microsecond=0)
# The library refuses a time inside a map but not as a variable: with these, run.completed_at is a time.
_TIMES = ("started_at", "completed_at")
# The fields of a run that conditions can read.
FIELDS = frozenset((*CompletedRun.__struct_fields__, "duration_ms", "step_count"))
ENVIRONMENT = cel.NewEnv(
    variables={
        "run": cel.Type.Map(cel.Type.STRING, cel.Type.DYN),
        **{f"run.{name}": cel.Type.TIMESTAMP for name in _TIMES},
    }
)
# A part of a run that conditions do not see completely: its path, and what of it is not seen.
Unseen = tuple[Path, str]


class Visible:
    """A run as conditions see it, converted once for all of them.

    *unknown* fields are omitted: a condition that needs one has no result. With *needed*, the fields that the
    conditions read together (``Reads.fields``), only those are converted: most conditions read three or four, and
    converting all takes longer than four evaluations.
    """

    __slots__ = ("_extent", "_run", "_shared", "_variables", "unknown", "unseen")

    def __init__(
        self,
        run: CompletedRun,
        *,
        unknown: frozenset[str] = frozenset(),
        needed: frozenset[str] = FIELDS,
    ) -> None:
        self._run = run
        self.unknown = unknown
        # Values of needed fields that were truncated for conditions.
        self.unseen: list[Unseen] = []
        self._variables: dict[str, Any] = {
            "run": visible_fields(run, needed - unknown if unknown else needed, self.unseen),
            **{f"run.{name}": _time(getattr(run, name)) for name in _TIMES if name in needed},
        }
        self._shared = ENVIRONMENT.Activation(self._variables)
        self._extent: Extent | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """The fields that conditions see, by name."""
        return self._variables["run"]  # type: ignore[no-any-return]

    @property
    def extent(self) -> Extent:
        """The size of the run; measured when a condition needs it."""
        if self._extent is None:
            self._extent = extent_of(visible_fields(self._run))
        return self._extent

    def activation(self, *, alone: bool) -> cel.Activation:
        """Return the run in the library's form: shared by all conditions, or for one evaluation only.

        Memory of an evaluation is freed with its activation: 18 MB for one filter over 1,000 steps. A new activation
        costs a conversion of the run: 2 ms for 1,000 steps.
        """
        return ENVIRONMENT.Activation(self._variables) if alone and not self.extent.is_usual else self._shared


def visible_fields(
    run: CompletedRun, names: frozenset[str] = FIELDS, unseen: list[Unseen] | None = None
) -> dict[str, Any]:
    """Return the fields called *names* as CEL values, ``duration_ms`` and ``step_count`` included.

    Times are RFC 3339 text, costs are doubles, strings are cut to ``VISIBLE_MAX`` characters, steps to the first
    ``VISIBLE_STEPS``, and integers beyond 64 bits become doubles. Truncated values are added to *unseen*.
    """
    unseen = [] if unseen is None else unseen
    return {name: _visible(run, name, unseen) for name in names & FIELDS}


def _visible(run: CompletedRun, name: str, unseen: list[Unseen]) -> Any:  # noqa: ANN401 - whatever a field can hold
    value = getattr(run, name)
    match name:
        case "usage":
            return msgspec.to_builtins(value, enc_hook=str) | {"cost_usd": _double(value.cost_usd)}
        case "steps":
            if len(value) > VISIBLE_STEPS:
                unseen.append(((name,), f"{len(value) - VISIBLE_STEPS:,} of its {len(value):,} steps were not seen"))
            steps = enumerate(value[:VISIBLE_STEPS])
            return [_visible_step(step, (name, position), unseen) for position, step in steps]  # CEL has no tuples
        case _ if isinstance(value, str | int | dict | None):
            return _bounded(value, (name,), unseen)
        case _:
            return msgspec.to_builtins(value)


def _visible_step(step: Step, path: Path, unseen: list[Unseen]) -> dict[str, Any]:
    made: dict[str, Any] = msgspec.to_builtins(step, enc_hook=str)
    made["cost_usd"] = _double(step.cost_usd)
    for name in STEP_TEXTS:
        if made[name] is not None and len(made[name]) > VISIBLE_MAX:
            made[name] = _bounded(made[name], (*path, name), unseen)
    return made


def _time(moment: datetime) -> datetime:
    try:
        return min(max(moment.astimezone(UTC), _EARLIEST), _LATEST)
    except OverflowError:
        # The offset leads out of the calendar.
        return _EARLIEST if moment.year == _EARLIEST.year else _LATEST


def _double(cost_usd: object) -> float | None:
    return None if cost_usd is None else float(str(cost_usd))


def _bounded(value: object, path: Path, unseen: list[Unseen]) -> object:
    if isinstance(value, str):
        if len(value) > VISIBLE_MAX:
            unseen.append((path, f"only the first {VISIBLE_MAX:,} characters of {path[0]} were seen"))
        return value[:VISIBLE_MAX]
    if isinstance(value, dict):
        return {key[:VISIBLE_MAX]: _bounded(item, (*path, key), unseen) for key, item in value.items()}
    if isinstance(value, list):
        return [_bounded(item, (*path, position), unseen) for position, item in enumerate(value)]
    if isinstance(value, int) and not isinstance(value, bool) and value not in _INT64:
        try:
            return float(value)
        except OverflowError:
            return float("inf") if value > 0 else float("-inf")
    return value
