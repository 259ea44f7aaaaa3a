"""The client's channel, leaner where a frame comes with every message.

The client makes a task of each delivery, and for a confirm of many messages it looks at every message that is still
unconfirmed and puts a call of its own into the loop for each that is meant. Without both a run took a fifth less of the
worker's CPU, with a backlog. And what waits on it is never cancelled by a lost line. The rest of the channel is the
client's, unchanged.
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

# Frames read ahead of the channel: beyond it the connection stops reading, and so, in the end, the broker sending.
_FRAMES_BUFFERED = 1_000


class Channel(AmqpChannel):
    """A channel whose consumers are called in the order of their deliveries, each before the next frame is read.

    So a consumer's callback must not wait for an answer of the broker on the same channel, nor raise.
    """

    async def rpc(self, frame: Frame, timeout: TimeoutType = None) -> Any:  # noqa: ANN401, ASYNC109 - the client's
        """Send *frame* and return its answer; where the connection ends first, the error is never a cancellation."""
        with not_cancelled():
            return await super().rpc(frame, timeout=timeout)

    async def close(
        self,
        exc: ExceptionType | None = asyncio.CancelledError,
        timeout: TimeoutType = None,  # noqa: ASYNC109 - the client's
    ) -> None:
        """Close as the client does; where the connection ends first, the error is never a cancellation."""
        with not_cancelled():
            await super().close(exc, timeout=timeout)

    async def _on_deliver_frame(self, frame: spec.Basic.Deliver) -> None:
        header = await self._get_frame()
        if not isinstance(header, ContentHeader):
            raise ValueError(f"a delivery is followed by {header!r}; expected its header")  # noqa: TRY004 - as the client
        message = await self._read_content(frame, header)
        consumer = self.consumers.get(frame.consumer_tag or "")
        if consumer is not None:  # a consumer that was cancelled a moment ago has no more use for it
            await consumer(message)

    async def _on_confirm_frame(self, frame: spec.Basic.Ack | spec.Basic.Nack | spec.Basic.Reject) -> None:
        upto = frame.delivery_tag or 0
        if isinstance(frame, spec.Basic.Reject) or not frame.multiple:
            self._confirm_delivery(upto, frame)
            return
        # In the order of their tags, but for those that were returned: they go to the end, and wait there for a later
        # confirm if this one does not get so far.
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
    """Open a channel on *connection*; a mandatory message that is returned is reported by its confirmation.

    Raises the client's errors, ``ConnectionError`` if the connection was closed a moment ago.
    """
    if connection.is_closed:
        raise ConnectionError("the connection was closed")
    # No wait between the choice of a number and its registration: nobody else can choose the same.
    number = max(connection.channels, default=0) + 1
    channel = Channel(
        connection, number, publisher_confirms=confirms, on_return_raises=False, frame_buffer=_FRAMES_BUFFERED
    )
    connection.channels[number] = channel
    await channel.open()
    return channel
