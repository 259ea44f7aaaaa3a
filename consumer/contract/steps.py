"""Reads the steps of a run in any form in which they are clear."""

from consumer.contract import scalars
from consumer.contract.adjustments import Adjustments
from consumer.contract.optional_fields import Fields, OptionalFields
from consumer.contract.scalars import INVALID
from domains.run import BIGINT_MAX, STEPS_MAX, TEXT_MAX, Step

_STEP_STATUSES = ("succeeded", "failed", "skipped", "unknown")
_INDEX_MAX = 2**31 - 1


def steps_in(document: Fields, adjustments: Adjustments) -> tuple[Step, ...]:
    """Return the steps of the run in *document*; what is no list of objects is dropped and recorded."""
    steps = document.get("steps")
    if not isinstance(steps, list):
        if steps is not None:
            adjustments.add("steps", steps, None)
        return ()
    if len(steps) > STEPS_MAX:
        adjustments.add("steps", f"{len(steps)} steps", f"the first {STEPS_MAX}")
    indexes = _Indexes(len(steps))
    kept = []
    for position, step in enumerate(steps[:STEPS_MAX]):
        if isinstance(step, dict):
            kept.append(_step(step, position, indexes, adjustments))
        else:
            adjustments.add(f"steps[{position}]", step, None)
    return tuple(kept)


def _step(step: Fields, position: int, indexes: "_Indexes", adjustments: Adjustments) -> Step:
    reader = OptionalFields(step, f"steps[{position}].", adjustments)
    status = scalars.folded(step.get("status"), _STEP_STATUSES) or "unknown"
    if status == "unknown" and step.get("status") is not None and not scalars.folded(step["status"], ("unknown",)):
        reader.adjusted("status", status)
    return Step(
        index=indexes.of(reader, position),
        skill=reader.text("skill"),
        status=status,  # type: ignore[arg-type]
        duration_ms=reader.read("duration_ms", lambda value: scalars.milliseconds_of(value, BIGINT_MAX)),
        cost_usd=reader.cost(),
        error_code=reader.error_code(),
        kind=reader.text("kind", TEXT_MAX),
        started_at=reader.read("started_at", scalars.time_of),
        model=reader.text("model", TEXT_MAX),
        input_tokens=reader.tokens("input_tokens"),
        output_tokens=reader.tokens("output_tokens"),
        error_message=reader.text("error_message"),
    )


class _Indexes:
    """Gives each step an index that is unique in the run."""

    def __init__(self, number: int) -> None:
        self._taken: set[int] = set()
        self._spare = number

    def of(self, reader: OptionalFields, position: int) -> int:
        """Return the step's own index; if it is missing or repeated its position, or one behind all positions."""
        found = scalars.integer_of(reader.fields.get("index"), _INDEX_MAX)
        index = found if isinstance(found, int) and found not in self._taken else position
        while index in self._taken:
            index = self._spare
            self._spare += 1
        self._taken.add(index)
        if found is INVALID and reader.fields.get("index") is not None:
            reader.adjusted("index", index)
        return index
