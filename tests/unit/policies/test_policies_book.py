"""The policy book: one query for many transactions, each condition compiled once, no blocked event loop."""

import asyncio
from typing import Any, cast
from uuid import uuid4

import pytest
from sqlalchemy.ext.asyncio import AsyncConnection

from domains.policies import book as module
from domains.policies.book import PolicyBook
from domains.policies.rules import PolicySet


class Rows:
    """A connection on which *conditions* are the current policies, and which counts its statements."""

    def __init__(self, *conditions: str) -> None:
        self.conditions = list(conditions)
        self.statements = 0
        self.may_respond = asyncio.Event()
        self.may_respond.set()
        self.failure: Exception | None = None

    async def execute(self, _: object) -> "Rows":
        self.statements += 1
        await self.may_respond.wait()
        if self.failure:
            raise self.failure
        return self

    def mappings(self) -> "Rows":
        return self

    def all(self) -> list[dict[str, Any]]:
        same = {"tenant_id": None, "version": 1, "effect": "flag", "severity": "LOW"}
        return [{**same, "policy_id": uuid4(), "name": f"p{n}", "condition": c} for n, c in enumerate(self.conditions)]


async def read(book: PolicyBook, rows: Rows) -> PolicySet:
    return await book.current(cast("AsyncConnection", rows))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    texts: list[str] = []
    original = module.compiled

    def counting(text: str) -> Any:
        texts.append(text)
        return original(text)

    monkeypatch.setattr(module, "compiled", counting)
    return texts


async def test_policies_are_reloaded_only_after_their_maximum_age():
    rows, book, hasty = Rows("true"), PolicyBook(max_age_seconds=3600), PolicyBook(max_age_seconds=0)
    assert await read(book, rows) is await read(book, rows)
    assert rows.statements == 1
    await read(hasty, rows)
    await read(hasty, rows)
    assert rows.statements == 3


async def test_a_condition_is_compiled_once_for_all_policies_and_reloads(compiled: list[str]):
    rows, book = Rows("true", "true", "run.is_synthetic", "(("), PolicyBook(max_age_seconds=0)
    for _ in range(3):
        assert len((await read(book, rows)).of("acme")) == 4
    assert sorted(compiled) == ["((", "run.is_synthetic", "true"]


async def test_concurrent_first_transactions_share_one_compilation_and_all_see_policies(compiled: list[str]):
    rows, book = Rows(*(f"run.duration_ms > {n}" for n in range(50))), PolicyBook()
    found = await asyncio.gather(*(read(book, rows) for _ in range(5)))
    assert [len(policies.of("acme")) for policies in found] == [50] * 5
    assert len(compiled) == 50


async def test_during_a_reload_other_transactions_use_the_known_policies(monkeypatch: pytest.MonkeyPatch):
    now = 1_000.0
    monkeypatch.setattr(module, "monotonic", lambda: now)  # otherwise the policies may expire on a busy machine
    rows, book = Rows("true"), PolicyBook(max_age_seconds=5)
    known = await read(book, rows)
    now += 5
    rows.may_respond.clear()
    reader = asyncio.create_task(read(book, rows))
    while rows.statements < 2:
        await asyncio.sleep(0)
    assert await read(book, rows) is known
    rows.may_respond.set()
    assert await reader is not known


async def test_compiling_many_policies_yields_to_the_event_loop():
    rows, yields = Rows(*(f"run.duration_ms > {n}" for n in range(200))), 0

    async def count() -> None:
        nonlocal yields
        while True:
            yields += 1
            await asyncio.sleep(0)

    counter = asyncio.create_task(count())
    await read(PolicyBook(), rows)
    counter.cancel()
    assert yields >= 20


async def test_a_failed_reload_is_retried_by_the_next_transaction():
    rows, book = Rows("true"), PolicyBook(max_age_seconds=3600)
    rows.failure = OSError("connection lost")
    with pytest.raises(OSError, match="connection lost"):
        await read(book, rows)
    rows.failure = None
    assert len((await read(book, rows)).of("acme")) == 1
