"""The limit of one quorum queue: publishers and consumers that do nothing else, with one queue and with several.

The clients send frames that were encoded once, and read only the headers of frames, so that RabbitMQ is the limit.
"""

import multiprocessing
import socket
import struct
import time
from collections.abc import Iterator
from multiprocessing.sharedctypes import Synchronized
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from pamqp import body, commands, frame, header
from servers import RabbitServer

from benchmarks.arena import cpu_of, process_of
from benchmarks.messages import PROPERTIES, bodies

SECONDS, WARM_UP_SECONDS = 8.0, 3.0
WINDOW, CHUNK = 2_000, 100  # unconfirmed or unacked messages of a client, and those that it sends or acks at once
_ACK, _DELIVER = struct.pack(">HH", 60, 80), struct.pack(">HH", 60, 60)
_HEADER = struct.Struct(">BHI")
_METHOD = 1


class Limit(NamedTuple):
    """Messages per second through all queues, RabbitMQ's CPU milliseconds for each, and the cores that it used."""

    rate: float
    cpu_ms: float
    cores: float


def measure(rabbit: RabbitServer, queues: int, pairs: int) -> Limit:
    """Publish to and consume from *queues* queues with *pairs* publishers and consumers for all of them."""
    names = [f"limit.{number}" for number in range(queues)]
    link = _Link(rabbit.url())
    for name in names:
        link.call(commands.Queue.Declare(queue=name, durable=True, arguments={"x-queue-type": "quorum"}))
    counters = [multiprocessing.Value("Q", 0) for _ in range(pairs)]
    clients = [
        multiprocessing.Process(target=role, args=(rabbit.url(), names[number % queues], counter), daemon=True)
        for role in (_consume, _publish)
        for number, counter in enumerate(counters)
    ]
    for client in clients:
        client.start()
    time.sleep(WARM_UP_SECONDS)
    server = process_of(rabbit)
    received, cpu, started = _sum(counters), cpu_of(server), time.monotonic()
    time.sleep(SECONDS)
    number, used, took = _sum(counters) - received, cpu_of(server) - cpu, time.monotonic() - started
    for client in clients:
        client.kill()
        client.join()
    for name in names:
        link.call(commands.Queue.Delete(queue=name))
    link.socket.close()
    return Limit(number / took, 1000 * used / max(1, number), used / took)


def _sum(counters: list["Synchronized[int]"]) -> int:
    return sum(counter.value for counter in counters)


class _Link:
    """A blocking connection with one channel."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.socket = socket.create_connection((parts.hostname or "", parts.port or 5672))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.methods = self._methods()
        self.socket.sendall(header.ProtocolHeader().marshal())
        next(self.methods)
        login = f"\0{parts.username}\0{parts.password}"
        self.call(commands.Connection.StartOk(mechanism="PLAIN", response=login, locale="en_US"), channel=0)
        self.send(commands.Connection.TuneOk(channel_max=1, frame_max=131_072, heartbeat=0), channel=0)
        self.call(commands.Connection.Open(virtual_host=unquote(parts.path[1:]) or "/"), channel=0)
        self.call(commands.Channel.Open())

    def send(self, method: frame.FrameTypes, *, channel: int = 1) -> None:
        self.socket.sendall(frame.marshal(method, channel))

    def call(self, method: frame.FrameTypes, *, channel: int = 1) -> None:
        """Send *method* and wait for the response, whatever it is."""
        self.send(method, channel=channel)
        next(self.methods)

    def _methods(self) -> Iterator[bytes]:
        """Yield the payloads of method frames, without those of headers and bodies."""
        unread = b""
        while data := self.socket.recv(1 << 20):
            unread, place = unread + data, 0
            while len(unread) - place >= _HEADER.size:
                kind, _, size = _HEADER.unpack_from(unread, place)
                end = place + _HEADER.size + size + 1
                if end > len(unread):
                    break
                if kind == _METHOD:
                    yield unread[place + _HEADER.size : end - 1]
                place = end
            unread = unread[place:]


def _publish(url: str, queue: str, _counter: "Synchronized[int]") -> None:
    link = _Link(url)
    link.call(commands.Confirm.Select())
    run = bodies(1, 1)[0]
    message = b"".join(
        frame.marshal(part, 1)
        for part in (
            commands.Basic.Publish(routing_key=queue),
            header.ContentHeader(body_size=len(run), properties=PROPERTIES),
            body.ContentBody(run),
        )
    )
    sent = confirmed = 0
    while True:
        while sent - confirmed < WINDOW:
            link.socket.sendall(message * CHUNK)
            sent += CHUNK
        payload = next(link.methods)
        if payload.startswith(_ACK):
            confirmed = max(confirmed, int.from_bytes(payload[4:12]))  # of one queue, confirms are in order


def _consume(url: str, queue: str, counter: "Synchronized[int]") -> None:
    link = _Link(url)
    link.call(commands.Basic.Qos(prefetch_count=WINDOW))
    link.call(commands.Basic.Consume(queue=queue))
    for payload in link.methods:
        if payload.startswith(_DELIVER):
            counter.value += 1
            if counter.value % CHUNK == 0:
                link.send(commands.Basic.Ack(delivery_tag=counter.value, multiple=True))
