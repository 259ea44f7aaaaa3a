"""Lists, replays and discards parked messages."""

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
from consumer.parked.scan import Held, Parked, Scan, scan
from consumer.wording import Progress

_OURS = "x-closeout-"
# Headers set by the broker, and headers that would route the message elsewhere again.
_BROKERS = ("x-death", "x-first-death-", "x-last-death-", "x-delivery-count", "x-acquired-count")
_FANS_OUT = ("CC", "BCC")


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """Selects messages; all given filters must match. ``selector`` is a position, a message id or a run."""

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
        """Return whether *message* is selected; without a parking time it is neither older nor newer."""
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
class Report(Scan):
    """The result of a scan: messages by reason, the first of them, and what was kept and why."""

    rows: list[Parked] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    fingerprints: set[bytes] = field(default_factory=set)
    untrusted: int = 0
    failed: int = 0

    @property
    def count(self) -> int:
        """The number of messages that were selected, replayed or removed."""
        return self.reasons.total()

    def add(self, message: Parked, *, rows: int) -> None:
        """Count *message*, and keep it if it is one of the first *rows*."""
        self.reasons[message.reason or "none"] += 1
        if len(self.rows) < rows:
            self.rows.append(message)


async def find(
    connection: BrokerConnection,
    filters: Filters,
    *,
    rows: int,
    limit: int | None = None,
    progress: Progress | None = None,
    bodies: list[Held] | None = None,
) -> Report:
    """Report the messages that *filters* select, at most *limit*, without a change; *bodies* gets the first *rows*."""
    report = Report()

    async def visit(batch: Sequence[Held]) -> Sequence[DeliveredMessage]:
        for parked, message in _selected(batch, filters, limit, report):
            if bodies is not None and len(report.rows) < rows:
                bodies.append((parked, message))
            report.add(parked, rows=rows)
            report.fingerprints.add(parked.fingerprint)
        return ()

    await scan(connection, visit, report, progress)
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
    """Publish the selected messages to where they came from; remove each one only after its confirm.

    They are published with the user of the operator who replays, which makes them trusted: messages parked as
    ``untrusted_publisher`` are replayed only if the filter names that reason. The original exchange is a header that a
    sender may forge: exchanges other than ``runs`` are used only if *exchanges* names them. An unconfirmed message
    stays parked, and ends the replay.
    """
    report = Report()
    channel = ConfirmedChannel(connection)

    async def visit(batch: Sequence[Held]) -> Sequence[DeliveredMessage]:
        chosen = [] if report.failure else _selected(batch, filters, limit, report)
        trusted = [h for h in chosen if h[0].reason != "untrusted_publisher" or filters.reason == h[0].reason]
        report.untrusted += len(chosen) - len(trusted)
        if not dry_run:
            answers = await asyncio.gather(
                *(_replay_one(channel, message, exchanges) for _, message in trusted), return_exceptions=True
            )
            chosen, trusted = trusted, []
            for held, answer in zip(chosen, answers, strict=True):
                if answer is None:
                    trusted.append(held)
                elif isinstance(answer, UnavailableError):
                    report.failed += 1
                    report.failure = report.failure or one_line(answer)
                elif isinstance(answer, TypeError | ValueError):  # a header that pamqp can read but not write
                    report.failed += 1
                else:
                    raise answer
        for parked, _ in trusted:
            report.add(parked, rows=rows)
        return () if dry_run else [message for _, message in trusted]

    await scan(connection, visit, report, progress)
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
    """Remove the selected messages; *dump* gets each batch first. *only* limits them to those of an earlier list."""
    report = Report()

    async def visit(batch: Sequence[Held]) -> Sequence[DeliveredMessage]:
        known = batch if only is None else [held for held in batch if held[0].fingerprint in only]
        chosen = [] if report.failure else _selected(known, filters, limit, report)
        try:
            if dump is not None and chosen:
                dump(chosen)
        except OSError as error:  # for example a full disk: nothing is removed that was not written
            report.failure = f"--dump: {one_line(error)}"
            return ()
        for parked, _ in chosen:
            report.add(parked, rows=rows)
        return [message for _, message in chosen]

    await scan(connection, visit, report, progress)
    return report


def _selected(batch: Sequence[Held], filters: Filters, limit: int | None, report: Report) -> list[Held]:
    taken = [held for held in batch if filters.take(held[0])]
    return taken if limit is None else taken[: max(0, limit - report.count - report.untrusted)]


async def _replay_one(channel: ConfirmedChannel, message: DeliveredMessage, exchanges: frozenset[str]) -> None:
    original, headers = message.header.properties, headers_of(message)
    kept = {name: getattr(original, name) for name in spec.Basic.Properties.attributes()}
    # Attempts restart at zero. Expiration and CC are dropped: the expiry has passed, and the other
    # queues already have their copies.
    kept |= {"user_id": channel.user, "expiration": None, "delivery_mode": PERSISTENT, "cluster_id": ""}
    kept["headers"] = {
        n: writable(v) for n, v in headers.items() if not n.startswith((_OURS, *_BROKERS)) and n not in _FANS_OUT
    }
    exchange, key = headers.get(EXCHANGE_HEADER), headers.get(ROUTING_KEY_HEADER)
    send = partial(channel.send, body=message.body, properties=spec.Basic.Properties(**kept))
    is_known = isinstance(exchange, str) and exchange in {RUNS_EXCHANGE, *exchanges} - {""}
    if is_known and isinstance(key, str) and (exchange, key) != (RUNS_EXCHANGE, RUN_COMPLETED_KEY):
        # A key without a binding may be forged or outdated; it must not block the others.
        with suppress(UnavailableError):
            return await send(exchange=str(exchange), routing_key=key)
    return await send(exchange=RUNS_EXCHANGE, routing_key=RUN_COMPLETED_KEY)
