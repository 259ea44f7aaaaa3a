"""Remembers the messages that this worker parked recently, because reading the parked queue would disturb it."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from aiormq import spec

from consumer.amqp.confirmed_channel import ConfirmedChannel
from consumer.amqp.connection import BrokerConnection
from consumer.contract.named_run import named_run
from consumer.contract.names import ATTEMPTS_HEADER, ERROR_HEADER, PARKED_QUEUE, REASON_HEADER

# Remembered messages: more than a page shows.
_REMEMBERED = 20
# Bytes of a body that is searched for tenant and run, in the worker's event loop; most runs are shorter.
_SEARCHED_BYTES = 256 * 1024
# Characters of a sender's text; a page cuts it again.
_KEPT = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class ParkedMessage:
    """A parked message without its body; ``tenant_id`` and ``run_id`` come from the body, if readable."""

    at: datetime
    reason: str
    error: str
    attempts: int
    size: int
    message_id: str | None
    tenant_id: str | None
    run_id: str | None


class ParkedLately:
    """The last messages that this worker parked, newest first."""

    def __init__(self) -> None:
        self._messages: deque[ParkedMessage] = deque(maxlen=_REMEMBERED)

    def newest(self) -> Sequence[ParkedMessage]:
        """Return the remembered messages, newest first."""
        return list(reversed(self._messages))

    def remember(self, body: bytes, properties: spec.Basic.Properties) -> None:
        """Remember a confirmed copy in the parked queue."""
        headers = properties.headers or {}
        tenant, run = named_run(body, content_encoding=properties.content_encoding, max_bytes=_SEARCHED_BYTES)
        attempts, message_id = headers.get(ATTEMPTS_HEADER), properties.message_id
        self._messages.append(
            ParkedMessage(
                at=datetime.now(UTC),
                reason=str(headers.get(REASON_HEADER)),
                error=str(headers.get(ERROR_HEADER))[:_KEPT],
                attempts=attempts if isinstance(attempts, int) else 0,
                size=len(body),
                message_id=None if message_id is None else str(message_id)[:_KEPT],
                tenant_id=None if tenant is None else tenant[:_KEPT],
                run_id=None if run is None else run[:_KEPT],
            )
        )


class RememberingChannel(ConfirmedChannel):
    """The settler's channel, which publishes only copies; remembers the parked ones."""

    def __init__(self, connection: BrokerConnection, lately: ParkedLately) -> None:
        super().__init__(connection)
        self._lately = lately

    async def send(self, *, exchange: str, routing_key: str, body: bytes, properties: spec.Basic.Properties) -> None:
        """Publish as :meth:`ConfirmedChannel.send` does, and remember a parked copy once it is confirmed."""
        await super().send(exchange=exchange, routing_key=routing_key, body=body, properties=properties)
        if routing_key == PARKED_QUEUE:  # through any exchange; events use another channel
            self._lately.remember(body, properties)
