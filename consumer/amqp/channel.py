"""aiormq's channel with less work per message.

aiormq creates a task per delivery, and for a ``multiple`` confirm it scans every unconfirmed message and schedules a
call for each one confirmed. Avoiding both saves a fifth of the worker's CPU per run with a backlog. In addition, a
lost connection raises ChannelLostError in the caller instead of cancelling it. Everything else is aiormq's, unchanged.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

from aiormq import spec
from aiormq.abc import AbstractConnection, ExceptionType, TimeoutType
from aiormq.channel import Channel as AmqpChannel
from aiormq.exceptions import ChannelInvalidStateError
from pamqp.base import Frame
from pamqp.header import ContentHeader

# Frames buffered for the channel. Beyond it the connection stops reading, and TCP flow control stops the broker.
_FRAMES_BUFFERED = 1_000


class Channel(AmqpChannel):
    """A channel that calls consumers in delivery order, each before it reads the next frame.

    A consumer's callback must therefore not wait for the broker on the same channel, and must not raise.
    """

    async def rpc(self, frame: Frame, timeout: TimeoutType = None) -> Any:  # noqa: ANN401, ASYNC109 - the client's
        """Send *frame* and return the response; raise :class:`ChannelLostError`, not a cancellation, if it is lost."""
        with not_cancelled():
            return await super().rpc(frame, timeout=timeout)

    async def close(
        self,
        exc: ExceptionType | None = asyncio.CancelledError,
        timeout: TimeoutType = None,  # noqa: ASYNC109 - the client's
    ) -> None:
        """Close as aiormq does; raise :class:`ChannelLostError`, not a cancellation, if the connection is lost."""
        with not_cancelled():
            await super().close(exc, timeout=timeout)

    async def _on_deliver_frame(self, frame: spec.Basic.Deliver) -> None:
        header = await self._get_frame()
        if not isinstance(header, ContentHeader):
            raise ValueError(f"a delivery is followed by {header!r}; expected its header")  # noqa: TRY004 - as the client
        message = await self._read_content(frame, header)
        consumer = self.consumers.get(frame.consumer_tag or "")
        if consumer is not None:  # the consumer may have been cancelled meanwhile
            await consumer(message)

    async def _on_confirm_frame(self, frame: spec.Basic.Ack | spec.Basic.Nack | spec.Basic.Reject) -> None:
        upto = frame.delivery_tag or 0
        if isinstance(frame, spec.Basic.Reject) or not frame.multiple:
            self._confirm_delivery(upto, frame)
            return
        # In tag order, except returned messages: they are moved to the end, and wait for a later confirm if this one
        # does not reach them.
        for tag in list(takewhile(lambda tag: tag <= upto, self.confirmations)):
            self._confirm_delivery(tag, frame)


class ChannelLostError(ChannelInvalidStateError):
    """aiormq cancelled a call because its channel or connection closed."""


@contextmanager
def not_cancelled() -> Iterator[None]:
    """Raise :class:`ChannelLostError` for a cancellation that is not the caller's own.

    aiormq ends calls on a closing channel with CancelledError. No handler for broker errors catches that, and it would
    end one of the worker's tasks silently.
    """
    try:
        yield
    except asyncio.CancelledError as error:
        if (task := asyncio.current_task()) and task.cancelling():
            raise
        raise ChannelLostError("the channel was closed") from error


async def open_channel(connection: AbstractConnection, *, confirms: bool) -> Channel:
    """Open a channel on *connection*; a returned mandatory message is the result of its confirmation.

    Raises aiormq's errors, and ``ConnectionError`` if the connection is closed.
    """
    if connection.is_closed:
        raise ConnectionError("the connection was closed")
    # No await between choosing and registering the number, so that no other task can choose the same.
    number = max(connection.channels, default=0) + 1
    channel = Channel(
        connection, number, publisher_confirms=confirms, on_return_raises=False, frame_buffer=_FRAMES_BUFFERED
    )
    connection.channels[number] = channel
    await channel.open()
    return channel
