"""What a condition reads of a run, as plain values: runs that are alike in them have the same result."""

from typing import NamedTuple

from domains.policies.cel.conditions import Condition
from domains.policies.cel.field_paths import Path
from domains.run import CompletedRun, Step, Usage

_PLAIN = {*CompletedRun.__struct_fields__} - {"usage", "steps", "metadata"}


class Projection(NamedTuple):
    """The fields that decide a condition's result: of the run (``usage.cost_usd``), of each step, and in metadata."""

    fields: tuple[str, ...]
    of_steps: tuple[str, ...]
    in_metadata: tuple[Path, ...]


def projection(condition: Condition) -> Projection | None:
    """Return what *condition* reads, or ``None`` if its result may depend on more than a few plain values."""
    fields, of_steps, in_metadata = [], [], []
    for path in condition.reads.paths:
        match path:
            case (str(name),) if name in _PLAIN:
                fields.append(name)
            case ("usage", str(name)) if name in Usage.__struct_fields__:
                fields.append(f"usage.{name}")
            case ("steps", None, str(name)) if name in Step.__struct_fields__:
                of_steps.append(name)
            case ("metadata", str() | int(), *_):
                in_metadata.append(path[1:])
            case _:
                return None
    return None if condition.depends_on_size else Projection(tuple(fields), tuple(of_steps), tuple(in_metadata))
