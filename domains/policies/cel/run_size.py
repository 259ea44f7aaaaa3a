"""The size of a run as far as it makes conditions expensive, and the cost of a condition on a run of a size."""

from collections.abc import Iterator
from operator import le
from typing import Any, NamedTuple

from domains.policies.cel import cost, sizes, syntax
from domains.run import VISIBLE_STEPS, CompletedRun, Step, Usage

# Bytes of a text that conditions see.
TEXT_MAX_BYTES = 16_384

# Text fields of any length.
TEXTS = (
    "error_message", "agent_id", "model", "synthetic_scenario_id", "run_ref", "parent_run_id", "session_id",
)  # fmt: skip
STEP_TEXTS = ("skill", "kind", "model", "error_message")


class Extent(NamedTuple):
    """The size of a run: steps, metadata keys and values, and bytes of its longest texts."""

    steps: int
    metadata: int
    message: int
    text: int

    @property
    def is_usual(self) -> bool:
        """Return whether every compiled condition is known to be cheap enough on such a run."""
        return all(map(le, self, USUAL))


LARGEST = Extent(steps=VISIBLE_STEPS, metadata=1_000, message=TEXT_MAX_BYTES, text=TEXT_MAX_BYTES)
USUAL = Extent(steps=100, metadata=16, message=1_000, text=256)


def extent_of(fields: dict[str, Any]) -> Extent:
    """Return the size of a run as conditions see it."""
    metadata, steps = fields["metadata"], fields["steps"]
    values = list(_values(metadata))
    texts = [*values, *(step[name] for step in steps for name in STEP_TEXTS), *(fields[name] for name in TEXTS[1:])]
    longest = max(map(_bytes_of, texts))
    return Extent(len(steps), len(values), _bytes_of(fields["error_message"]), longest)


def _values(value: object) -> Iterator[object]:
    """Return every key, list item and value in *value*, at any depth."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _values(item)
    elif isinstance(value, list):
        for item in value:
            yield from _values(item)
    else:
        yield value


def _bytes_of(value: object) -> int:
    # An upper bound without encoding: UTF-8 has at most four bytes per character.
    return 0 if not isinstance(value, str) else len(value) if value.isascii() else 4 * len(value)


def milliseconds(tree: syntax.Node, extent: Extent) -> int:
    """Return the maximum milliseconds of a condition on a run of *extent*; raise :class:`cost.CostFaultError`."""
    # Identities, codes and numbers have at most 128 ASCII characters.
    text, short = sizes.text(max(128, extent.text)), sizes.text(128)
    step = {**dict.fromkeys(Step.__struct_fields__, short), **dict.fromkeys(STEP_TEXTS, text)}
    # A value of the metadata may be an object or a list of all its other values.
    nested = sizes.text(max(128, extent.text, extent.metadata))
    fields = dict.fromkeys((*CompletedRun.__struct_fields__, "duration_ms", "step_count"), short)
    fields |= {
        **dict.fromkeys(TEXTS, text),
        "error_message": sizes.text(max(128, extent.message)),
        "usage": sizes.of_object(dict.fromkeys(Usage.__struct_fields__, short)),
        "steps": sizes.of_list(extent.steps, sizes.of_object(step)),
        "metadata": sizes.of_list(extent.metadata, nested),
    }
    return cost.nanoseconds(tree, sizes.of_object(fields)) // 1_000_000
