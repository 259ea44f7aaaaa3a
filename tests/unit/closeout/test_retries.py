"""Transient errors are retried in place for a limited time; every other error is raised at once."""

import pytest

from consumer.closeout import retries
from consumer.closeout.retries import retry_transient
from consumer.errors import UnavailableError


class Work:
    """Raises *errors* one by one, then returns ``done``."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls = 0

    async def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"


async def test_a_transient_error_is_retried():
    work = Work(UnavailableError("1"), UnavailableError("2"))
    assert (await retry_transient(work), work.calls) == ("done", 3)


async def test_another_error_is_raised_at_once():
    work = Work(ValueError("1"))
    with pytest.raises(ValueError, match="1"):
        await retry_transient(work)
    assert work.calls == 1


@pytest.mark.parametrize("limit", [{"give_up_after": 0.0}, {"give_up": lambda: True}])
async def test_the_last_transient_error_is_raised_once_retries_end(limit):
    work = Work(UnavailableError("1"), UnavailableError("2"))
    with pytest.raises(UnavailableError, match="1"):
        await retry_transient(work, **limit)
    assert work.calls == 1


async def test_pauses_grow_up_to_the_longest(monkeypatch):
    asked: list[dict[str, float]] = []

    def wait(**limits: float):
        asked.append(limits)
        return lambda _state: 0.0

    monkeypatch.setattr(retries, "wait_random_exponential", wait)
    assert await retry_transient(Work(UnavailableError("1"))) == "done"
    assert asked == [{"multiplier": 0.05, "max": 1.0}]
