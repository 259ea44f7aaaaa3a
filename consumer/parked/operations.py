"""Looking at what was parked, sending it back, throwing it away. Contract sections 5 and 7."""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial

from aiormq import spec
from aiormq.abc import DeliveredMessage

from consumer.amqp.confirmed_channel import ConfirmedChannel
from consumer.amqp.connection import BrokerConnection
from consumer.amqp.lenient_codec import writable
from consumer.contract.names import EXCHANGE_HEADER, PERSISTENT, ROUTING_KEY_HEADER, RUN_COMPLETED_KEY, RUNS_EXCHANGE
from consumer.errors import UnavailableError, one_line
from consumer.parked.copies import headers_of
from consumer.parked.scan import Held, Parked, Progress, Walk, walk

_OURS = "x-closeout-"
# The broker's own words about a message, not the sender's, and what would send the message elsewhere again.
_BROKERS = ("x-death", "x-first-death-", "x-last-death-", "x-delivery-count", "x-acquired-count")
_FANS_OUT = ("CC", "BCC")


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """Which messages are meant; all that are given must hold. ``selector`` is a position, a message id or a run."""

    reason: str | None = None
    tenant: str | None = None
    run: str | None = None
    message_id: str | None = None
    parked_before: datetime | None = None
    parked_after: datetime | None = None
    selector: str | None = None

    def __bool__(self) -> bool:
        return self != Filters()

    def take(self, message: Parked) -> bool:
        """Say whether *message* is meant; one that does not say when it was parked is neither older nor newer."""
        at = message.parked_at
        runs = {message.run_id, f"{message.tenant_id}/{message.run_id}"} - {None}
        return (
            self.reason in {None, message.reason}
            and self.tenant in {None, message.tenant_id}
            and (self.run is None or self.run in runs)
            and self.message_id in {None, message.message_id}
            and (self.parked_before is None or (at is not None and at < self.parked_before))
            and (self.parked_after is None or (at is not None and at > self.parked_after))
            and (self.selector is None or self.selector in {*runs, message.message_id, str(message.position)})
        )


@dataclass(slots=True)
class Report(Walk):
    """What a walk found or did: how many by reason, the first of them, and what stayed and why."""

    rows: list[Parked] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    fingerprints: set[bytes] = field(default_factory=set)
    vouching_needed: int = 0
    failed: int = 0

    @property
    def count(self) -> int:
        """How many were selected, or sent back, or removed."""
        return self.reasons.total()

    def add(self, message: Parked, *, rows: int) -> None:
        """Count *message*, and keep it among the first *rows*."""
        self.reasons[message.reason or "none"] += 1
        if len(self.rows) < rows:
            self.rows.append(message)


async def look(
    connection: BrokerConnection,
    filters: Filters,
    *,
    rows: int,
    limit: int | None = None,
    progress: Progress | None = None,
    bodies: list[Held] | None = None,
) -> Report:
    """Report which messages *filters* select, at most *limit*, and change nothing; *bodies* gets the first *rows*."""
    report = Report()

    async def visit(batch: Sequence[Held]) -> Sequence[DeliveredMessage]:
        for parked, message in _selected(batch, filters, limit, report):
            if bodies is not None and len(report.rows) < rows:
                bodies.append((parked, message))
            report.add(parked, rows=rows)
            report.fingerprints.add(parked.fingerprint)
        return ()

    await walk(connection, visit, report, progress)
    return report


async def replay(
    connection: BrokerConnection,
    filters: Filters,
    *,
    rows: int,
    limit: int | None = None,
    exchanges: frozenset[str] = frozenset(),
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Send the selected messages back to where they came from, confirmed, and remove each only then.

    They go out in the name of who replays, which vouches for them; those parked as ``untrusted_publisher`` go only
    where the filter names that reason. Where a message came from is a header that its sender may have forged: other
    exchanges than ``runs`` count only if *exchanges* names them. What was not confirmed stays, and ends the work.
    """
    report = Report()
    channel = ConfirmedChannel(connection)

    async def visit(batch: Sequence[Held]) -> Sequence[DeliveredMessage]:
        chosen = [] if report.failure else _selected(batch, filters, limit, report)
        vouched = [h for h in chosen if h[0].reason != "untrusted_publisher" or filters.reason == h[0].reason]
        report.vouching_needed += len(chosen) - len(vouched)
        if not dry_run:
            answers = await asyncio.gather(
                *(_send_back(channel, message, exchanges) for _, message in vouched), return_exceptions=True
            )
            chosen, vouched = vouched, []
            for held, answer in zip(chosen, answers, strict=True):
                if answer is None:
                    vouched.append(held)
                elif isinstance(answer, UnavailableError):
                    report.failed += 1
                    report.failure = report.failure or one_line(answer)
                elif isinstance(answer, TypeError | ValueError):  # a header that the client reads but cannot write
                    report.failed += 1
                else:
                    raise answer
        for parked, _ in vouched:
            report.add(parked, rows=rows)
        return () if dry_run else [message for _, message in vouched]

    await walk(connection, visit, report, progress)
    return report


async def discard(
    connection: BrokerConnection,
    filters: Filters,
    *,
    rows: int,
    limit: int | None = None,
    only: set[bytes] | None = None,
    dump: Callable[[Sequence[Held]], None] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Remove the selected messages; *dump* is called with each batch before, and *only* holds to a look's findings."""
    report = Report()

    async def visit(batch: Sequence[Held]) -> Sequence[DeliveredMessage]:
        known = batch if only is None else [held for held in batch if held[0].fingerprint in only]
        chosen = [] if report.failure else _selected(known, filters, limit, report)
        try:
            if dump is not None and chosen:
                dump(chosen)
        except OSError as error:  # the disk is full, say: nothing goes that was not written down
            report.failure = f"--dump: {one_line(error)}"
            return ()
        for parked, _ in chosen:
            report.add(parked, rows=rows)
        return [message for _, message in chosen]

    await walk(connection, visit, report, progress)
    return report


def _selected(batch: Sequence[Held], filters: Filters, limit: int | None, report: Report) -> list[Held]:
    taken = [held for held in batch if filters.take(held[0])]
    return taken if limit is None else taken[: max(0, limit - report.count - report.vouching_needed)]


async def _send_back(channel: ConfirmedChannel, message: DeliveredMessage, exchanges: frozenset[str]) -> None:
    original, headers = message.header.properties, headers_of(message)
    kept = {name: getattr(original, name) for name in spec.Basic.Properties.attributes()}
    # Attempts start anew. Expiration and CC stay off: the time is long over, and the others have their copies.
    kept |= {"user_id": channel.user, "expiration": None, "delivery_mode": PERSISTENT, "cluster_id": ""}
    kept["headers"] = {
        n: writable(v) for n, v in headers.items() if not n.startswith((_OURS, *_BROKERS)) and n not in _FANS_OUT
    }
    exchange, key = headers.get(EXCHANGE_HEADER), headers.get(ROUTING_KEY_HEADER)
    send = partial(channel.send, body=message.body, properties=spec.Basic.Properties(**kept))
    believed = isinstance(exchange, str) and exchange in {RUNS_EXCHANGE, *exchanges} - {""}
    if believed and isinstance(key, str) and (exchange, key) != (RUNS_EXCHANGE, RUN_COMPLETED_KEY):
        # A key that no queue takes may be forged, or no longer bound; it must not hold up the others.
        with suppress(UnavailableError):
            return await send(exchange=str(exchange), routing_key=key)
    return await send(exchange=RUNS_EXCHANGE, routing_key=RUN_COMPLETED_KEY)
