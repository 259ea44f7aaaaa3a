"""Describes a stored step for people. Pure functions."""

from datetime import UTC, datetime
from typing import Any


def name_of(step: dict[str, Any]) -> str | None:
    """Return the step's skill; without one its kind, or its model."""
    return step.get("skill") or step.get("kind") or step.get("model")


def details_of(step: dict[str, Any]) -> list[str]:
    """Return the step's stored details other than name, outcome and cost: kind, model, tokens and start (UTC)."""
    found = [step[field] for field in ("kind", "model") if step.get(field) and step[field] != name_of(step)]
    counts = [(step.get(f"{way}_tokens"), way) for way in ("input", "output")]
    tokens = " + ".join(f"{count:,} {way}" for count, way in counts if count is not None)
    found += [f"{tokens} tokens"] if tokens else []
    if step.get("started_at"):
        started = datetime.fromisoformat(step["started_at"]).astimezone(UTC)
        found.append(f"at {started:%H:%M:%S}.{started.microsecond // 1_000:03}")
    return found
