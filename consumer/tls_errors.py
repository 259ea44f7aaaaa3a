"""Why a connection with TLS was not had, in words: whose certificate it is, for whom, until when, signed by whom.

The clients say that verification failed; what the certificate says is looked up in a connection that sends nothing.
"""

import asyncio
import ssl
import struct
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

import asyncpg

from config.urls import SYSTEM_ROOTS
from consumer.errors import links

# Seconds for a look at the other side's certificate; a server that is there answers in milliseconds.
_LOOK_SECONDS = 3.0
# Seconds for what a server has against our certificate; it says so at once, and otherwise waits for us.
_ALERT_SECONDS = 1.0
# How a connection ends that the other side wants nothing of.
CUT_SHORT = (ConnectionResetError, BrokenPipeError, asyncio.IncompleteReadError, asyncpg.ConnectionDoesNotExistError)
# OpenSSL's flags that Python has no name for (x509_vfy.h): a certificate that is trusted itself needs no authority, and
# may have expired.
_PARTIAL_CHAIN, _NO_CHECK_TIME = 0x80000, 0x200000
# OpenSSL's reasons (x509_vfy.h).
_NOT_YET, _EXPIRED, _REVOKED, _HOST, _ADDRESS = 9, 10, 23, 62, 64
_UNKNOWN_AUTHORITY = (18, 19, 20, 21)
# PostgreSQL's documentation, "Message Formats": SSLRequest, answered by S or N.
_SSL_REQUEST = struct.pack("!ii", 8, 80_877_103)
# Names of a certificate that are told.
_NAMES_TOLD = 5

# What is done on a line once the handshake is over.
_Then = Callable[[asyncio.StreamReader, ssl.SSLObject], Awaitable[Any]]


class HandshakeError(ConnectionError):
    """A server that is there cannot be talked to safely. ``str()`` says why, ``remedy`` what to do."""

    def __init__(self, words: str, remedy: str) -> None:
        super().__init__(words)
        self.remedy = remedy


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """Whom we tried to talk to; *given* are the URL's parameters, under the names that its writer knows."""

    kind: Literal["postgresql", "rabbitmq"]
    host: str
    port: int
    tls: bool
    given: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def authority(self) -> str:
        """Return how the URL names the authorities that are trusted."""
        name = "sslrootcert" if self.kind == "postgresql" else "cafile"
        file = self.given.get(name, SYSTEM_ROOTS)
        return "any authority that this machine trusts" if file == SYSTEM_ROOTS else f"{name}={file}"

    @property
    def identity(self) -> tuple[str, str, str]:
        """Return the parameters of our own certificate and of its key, and the certificate's file."""
        cert, key = ("sslcert", "sslkey") if self.kind == "postgresql" else ("certfile", "keyfile")
        return cert, key, self.given.get(cert, "")


async def explained(error: BaseException, server: Server) -> HandshakeError | None:
    """Return *error* in words, if it came of a handshake with *server*; looks at its certificate, and never raises."""
    failure = next((link for link in links(error) if isinstance(link, ssl.SSLError)), None)
    if failure is None and server.tls and any(isinstance(link, CUT_SHORT) for link in links(error)):
        failure = await _alert(server)
    if isinstance(failure, ssl.SSLCertVerificationError):
        return _refused_by_us(failure, server, await _certificate(server))
    if failure is not None:
        return _refused_by_them(failure.reason or "", server)
    if server.kind == "postgresql" and any("rejected SSL upgrade" in str(link) for link in links(error)):  # asyncpg's
        words = f"{server} does not speak TLS, which sslmode={server.given.get('sslmode')} insists on"
        return HandshakeError(words, "turn ssl on there, or correct host and port in the URL")
    return None


async def speaks_tls(server: Server) -> bool:
    """Return whether the server expects TLS, for a plain connection that got no sensible response."""
    with suppress(OSError, TimeoutError):
        async with asyncio.timeout(_LOOK_SECONDS):
            await _handshake(server, _trusting_all(server), _shown)
            return True
    return False


def _refused_by_us(failure: ssl.SSLCertVerificationError, server: Server, seen: dict[str, Any]) -> HandshakeError:
    code, which = failure.verify_code, f"the certificate of {server}{_in_brackets(seen)}"
    renew = "have the server's certificate renewed and read again; a worker goes on by itself then"
    if code == _EXPIRED:
        return HandshakeError(f"{which} expired{_time(seen, 'notAfter', ' on ')}", renew)
    if code == _NOT_YET:
        remedy = "look at this machine's clock, then at the server's certificate"
        return HandshakeError(
            f"{which} is not valid before{_time(seen, 'notBefore', ' ') or ' some later time'}", remedy
        )
    if code in {_HOST, _ADDRESS}:
        names = _names(seen)
        told = f" but for {', '.join(names[:_NAMES_TOLD])}{' and more' if names[_NAMES_TOLD:] else ''}" if names else ""
        remedy = "write a host into the URL that the certificate names, or have one made that names this host"
        return HandshakeError(f"{which} is not for {server.host}{told}", remedy)
    if code in _UNKNOWN_AUTHORITY:
        signer = _common_name(seen.get("issuer")) or "an authority"
        words = f"{which} is signed by {signer}, and not by {server.authority}"
        name = "sslrootcert" if server.kind == "postgresql" else "cafile"
        return HandshakeError(words, f"put the authority's certificate into {name}, if it is the server's")
    words = "was revoked" if code == _REVOKED else f"cannot be trusted: {failure.verify_message}"
    return HandshakeError(f"{which} {words}", renew)


def _refused_by_them(reason: str, server: Server) -> HandshakeError:
    """Put an alert that the other side sent into words; what is not foreseen keeps OpenSSL's name."""
    cert, key, file = server.identity
    ours = f"our certificate, {cert}={file}" if file else "our certificate"
    wants = HandshakeError(
        f"{server} asks for a client certificate", f"name one in the URL: {cert}=FILE and {key}=FILE"
    )
    renew = f"renew the file; it is read again at each connection ({cert}, {key})"
    if reason in {"TLSV13_ALERT_CERTIFICATE_REQUIRED", "PEER_DID_NOT_RETURN_A_CERTIFICATE"}:
        return wants
    if reason in {"SSLV3_ALERT_HANDSHAKE_FAILURE", "SSLV3_ALERT_BAD_CERTIFICATE"} and not file:
        return wants  # as it is said in TLS 1.2
    if reason == "WRONG_VERSION_NUMBER" or "RECORD_LAYER" in reason or reason == "PACKET_LENGTH_TOO_LONG":
        return HandshakeError(
            f"{server} does not speak TLS", "write the port at which it does (RabbitMQ's is 5671 by default)"
        )
    if reason == "TLSV1_ALERT_UNKNOWN_CA":
        remedy = f"have one signed by an authority that the server is told of, and name it in {cert}, {key}"
        return HandshakeError(f"{server} does not know the authority that signed {ours}", remedy)
    if reason == "SSLV3_ALERT_CERTIFICATE_EXPIRED":
        return HandshakeError(f"{server} says that {ours}, has expired" if file else f"{server} says expired", renew)
    words = reason.replace("_", " ").lower() or "no reason given"
    return HandshakeError(f"the TLS handshake with {server} failed: {words}", "compare the TLS versions of both sides")


async def _certificate(server: Server) -> dict[str, Any]:
    """Return what the server's certificate says, as :meth:`ssl.SSLSocket.getpeercert` does; empty if it is not had.

    Two connections: Python reads a certificate only where it is trusted, so the first fetches it and the second trusts
    it. Nothing is sent to whoever shows it.
    """
    with suppress(OSError, TimeoutError, ValueError):
        async with asyncio.timeout(_LOOK_SECONDS):
            shown = await _handshake(server, _trusting_all(server), _shown)
            context = _context(server)
            context.load_verify_locations(cadata=shown)
            context.verify_flags |= ssl.VerifyFlags(_PARTIAL_CHAIN | _NO_CHECK_TIME)
            return dict(await _handshake(server, context, _read))
    return {}


async def _alert(server: Server) -> ssl.SSLError | None:
    """Return what the server says of our certificate. Who has sent something already may get a reset in its place."""
    try:
        async with asyncio.timeout(_ALERT_SECONDS):
            await _handshake(server, _trusting_all(server), _next_byte)
    except ssl.SSLError as error:
        return error
    except (OSError, TimeoutError, ValueError):
        return None
    return None


async def _handshake(server: Server, context: ssl.SSLContext, then: _Then) -> Any:  # noqa: ANN401 - what *then* returns
    reader, writer = await asyncio.open_connection(
        server.host, server.port, ssl=None if server.kind == "postgresql" else context
    )
    try:
        if server.kind == "postgresql":
            writer.write(_SSL_REQUEST)
            if await reader.read(1) != b"S":
                raise ConnectionError("no TLS there")
            await writer.start_tls(context, server_hostname=server.host)
        return await then(reader, writer.get_extra_info("ssl_object"))
    finally:
        writer.transport.abort()


async def _next_byte(reader: asyncio.StreamReader, _line: ssl.SSLObject) -> bytes:
    return await reader.read(1)


async def _shown(_reader: asyncio.StreamReader, line: ssl.SSLObject) -> bytes:
    return line.getpeercert(binary_form=True) or b""


async def _read(_reader: asyncio.StreamReader, line: ssl.SSLObject) -> dict[str, Any]:
    return line.getpeercert() or {}


def _context(server: Server) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    _, key, file = server.identity
    if file:  # a server that asks for one ends the handshake without it
        password = server.given.get("sslpassword", "")
        context.load_cert_chain(file, server.given.get(key) or None, lambda: password)
    return context


def _trusting_all(server: Server) -> ssl.SSLContext:
    context = _context(server)
    context.verify_mode = ssl.CERT_NONE
    return context


def _in_brackets(seen: Mapping[str, Any]) -> str:
    name = _common_name(seen.get("subject"))
    return f" ({name})" if name else ""


def _common_name(name: Any) -> str:  # noqa: ANN401 - ssl's nested tuples
    """Return how a certificate calls somebody: by the common name, else by the organization."""
    parts = dict(_parts(name))
    return str(parts.get("commonName") or parts.get("organizationName") or "")


def _parts(name: Any) -> Iterator[tuple[str, str]]:  # noqa: ANN401 - ssl's nested tuples
    for relative in name or ():
        yield from relative


def _names(seen: Mapping[str, Any]) -> list[str]:
    return [str(name) for _, name in seen.get("subjectAltName", ())]


def _time(seen: Mapping[str, Any], name: str, before: str) -> str:
    if name not in seen:
        return ""
    at = datetime.fromtimestamp(ssl.cert_time_to_seconds(seen[name]), UTC)
    return f"{before}{at:%Y-%m-%d %H:%M:%S}Z"
