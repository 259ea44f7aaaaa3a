"""Just enough of two protocols: to know that a server answers, and to send PostgreSQL a statement.

Formats: PostgreSQL's documentation, "Message Formats" (protocol 3.0), and AMQP 0-9-1, 4.2.2 and 2.3.5.
"""

import contextlib
import socket
import struct
from collections.abc import Iterator

PROTOCOL_3_0 = 196_608
AMQP_HEADER = b"AMQP\0\0\x09\x01"
METHOD_FRAME = 1


class SqlError(RuntimeError):
    """PostgreSQL refused: its message, with the SQLSTATE in front."""


def connects(port: int, *, seconds: float = 1.0) -> bool:
    """Tell whether anybody listens at *port*."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), seconds):
        return True
    return False


def answers_amqp(port: int, *, seconds: float = 1.0) -> bool:
    """Tell whether a broker at *port* answers the protocol header with a method frame."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), seconds) as line:
        line.sendall(AMQP_HEADER)
        return line.recv(1) == bytes([METHOD_FRAME])
    return False


def answers_sql(port: int, *, user: str, seconds: float = 1.0) -> bool:
    """Tell whether PostgreSQL at *port* opens a session; a bare connect succeeds too early."""
    with contextlib.suppress(OSError, SqlError), session(port, user, "postgres", seconds):
        return True
    return False


def query(port: int, sql: str, *, user: str, database: str, seconds: float = 60.0) -> list[list[str | None]]:
    """Run *sql*, one or more statements, and return all rows as text.

    Several statements are one transaction; CREATE DATABASE and its like must come alone.
    """
    with session(port, user, database, seconds) as line:
        line.sendall(_message(b"Q", sql.encode() + b"\0"))
        return [_row(body) for kind, body in _until_ready(line) if kind == b"D"]


@contextlib.contextmanager
def session(port: int, user: str, database: str, seconds: float) -> Iterator[socket.socket]:
    """Open a session that needs no password, ready for a query."""
    with socket.create_connection(("127.0.0.1", port), seconds) as line:
        fields = f"user\0{user}\0database\0{database}\0application_name\0servers\0\0".encode()
        line.sendall(_message(b"", struct.pack("!i", PROTOCOL_3_0) + fields))
        for kind, body in _until_ready(line):
            if kind == b"R" and struct.unpack("!i", body[:4]) != (0,):
                raise SqlError("28000 the server asks for a password")
        yield line
        line.sendall(_message(b"X", b""))


def _message(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("!i", len(body) + 4) + body


def _until_ready(line: socket.socket) -> Iterator[tuple[bytes, bytes]]:
    """Yield messages until the server waits for the next query; raise its error then."""
    error: SqlError | None = None
    while True:
        kind, length = struct.unpack("!ci", _exactly(line, 5))
        body = _exactly(line, length - 4)
        if kind == b"Z":
            break
        if kind == b"E":
            fields = {field[:1]: field[1:].decode() for field in body.split(b"\0") if field}
            error = SqlError(f"{fields.get(b'C', '?')} {fields.get(b'M', '?')}")
            if fields.get(b"V") in {"FATAL", "PANIC"}:
                break
        yield kind, body
    if error is not None:
        raise error


def _exactly(line: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = line.recv(size - len(data))
        if not part:
            raise ConnectionResetError("PostgreSQL closed the connection")
        data += part
    return bytes(data)


def _row(body: bytes) -> list[str | None]:
    """Decode a DataRow: a count, then each value as its length (-1 for null) and text."""
    values: list[str | None] = []
    position = 2
    for _ in range(struct.unpack_from("!h", body)[0]):
        (length,) = struct.unpack_from("!i", body, position)
        position += 4
        values.append(None if length < 0 else body[position : position + length].decode())
        position += max(length, 0)
    return values
