"""Turns errors of TLS connections into messages: the cause, and what to do."""

import asyncio
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import asyncpg

from config.urls import SYSTEM_ROOTS
from consumer.errors import links

# Errors of a connection that the server closed without giving a reason.
CUT_SHORT = (ConnectionResetError, BrokenPipeError, asyncio.IncompleteReadError, asyncpg.ConnectionDoesNotExistError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """The server of a connection; *given* are the URL's parameters, under the URL's own names."""

    kind: Literal["postgresql", "rabbitmq"]
    host: str
    port: int
    tls: bool
    given: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def names(self) -> tuple[str, str, str]:
        """The URL's parameters for the trusted authorities, the client certificate and its key."""
        postgresql = ("sslrootcert", "sslcert", "sslkey")
        return postgresql if self.kind == "postgresql" else ("cafile", "certfile", "keyfile")


class HandshakeError(ConnectionError):
    """A connection to *server* failed because of TLS. ``str()`` is the cause, ``remedy`` what to do."""

    def __init__(self, server: Server, cause: str, remedy: str) -> None:
        super().__init__(cause)
        self.server = server
        self.remedy = remedy


def explain(error: BaseException, server: Server) -> HandshakeError | None:
    """Return the message for *error*, or ``None`` if TLS is not its cause."""
    failure = next((link for link in links(error) if isinstance(link, ssl.SSLError)), None)
    if isinstance(failure, ssl.SSLCertVerificationError):
        return _not_verified(failure, server)
    if failure is not None:
        return refused(failure.reason or "", server)
    if server.kind == "postgresql" and any("rejected SSL upgrade" in str(link) for link in links(error)):  # asyncpg's
        cause = f"{server} does not use TLS, which sslmode={server.given.get('sslmode')} requires"
        return HandshakeError(server, cause, "turn ssl on there, or correct host and port in the URL")
    if server.tls and any(isinstance(link, CUT_SHORT) for link in links(error)):
        cause = f"{server} closed the connection in the TLS handshake, or before login"
        return HandshakeError(server, cause, f"check {server.names[1]} in the URL; the server's log has the reason")
    return None


def _not_verified(failure: ssl.SSLCertVerificationError, server: Server) -> HandshakeError:
    authority = server.names[0]
    file = server.given.get(authority, SYSTEM_ROOTS)
    trusted = "any authority that this machine trusts" if file == SYSTEM_ROOTS else f"{authority}={file}"
    renew = "renew the server's certificate and reload it; a worker then reconnects"
    host = f"is not valid for {server.host}", "use a host that the certificate names, or issue one that names this host"
    unknown = f"is not signed by {trusted}", f"add the certificate of the server's authority to {authority}"
    causes = {  # by OpenSSL's reasons (x509_vfy.h)
        9: ("is not valid yet", "check this machine's clock, then the server's certificate"),
        10: ("has expired", renew),
        23: ("was revoked", renew),
        **dict.fromkeys((62, 64), host),
        **dict.fromkeys((18, 19, 20, 21), unknown),
    }
    cause, remedy = causes.get(failure.verify_code, (f"cannot be verified: {failure.verify_message}", renew))
    return HandshakeError(server, f"the certificate of {server} {cause}", remedy)


def refused(reason: str, server: Server) -> HandshakeError:
    """Return the message for an alert of *server*, or for a response that is not TLS; *reason* is OpenSSL's name."""
    _, cert, key = server.names
    file = server.given.get(cert, "")
    ours = f"our certificate, {cert}={file}"
    wanted = "requires a client certificate", f"name one in the URL: {cert}=FILE and {key}=FILE"
    plain = "does not use TLS", "use the port that does (5671 is RabbitMQ's default)"
    causes = {
        "TLSV13_ALERT_CERTIFICATE_REQUIRED": wanted,
        **dict.fromkeys(("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG"), plain),
        "TLSV1_ALERT_UNKNOWN_CA": (
            f"does not trust the authority that signed {ours}",
            f"use one that is signed by an authority the server trusts ({cert}, {key})",
        ),
        "SSLV3_ALERT_CERTIFICATE_EXPIRED": (
            f"reports that {ours}, has expired",
            f"renew the file; it is read again at each connection ({cert}, {key})",
        ),
    }
    if not file:  # TLS 1.2 has no specific alert for this
        causes |= dict.fromkeys(("SSLV3_ALERT_HANDSHAKE_FAILURE", "SSLV3_ALERT_BAD_CERTIFICATE"), wanted)
    described = reason.replace("_", " ").lower() or "no reason given"
    other = f"failed the TLS handshake: {described}", "compare the TLS versions of both sides"
    cause, remedy = causes.get(reason, other)
    return HandshakeError(server, f"{server} {cause}", remedy)
