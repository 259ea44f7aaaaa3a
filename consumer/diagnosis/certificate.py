"""Reads the certificate of a server that a worker does not trust, over separate connections that send nothing."""

import asyncio
import ssl
import struct
from datetime import UTC, datetime
from typing import Any

from consumer.errors import links
from consumer.tls_errors import CUT_SHORT, HandshakeError, Server, refused

# Seconds for all connections to one server; a reachable one responds in milliseconds.
_TIMEOUT_SECONDS = 3.0
# OpenSSL's flags that Python does not name (x509_vfy.h): a trusted certificate needs no authority, and may be expired.
_PARTIAL_CHAIN, _NO_CHECK_TIME = 0x80000, 0x200000
# PostgreSQL's documentation, "Message Formats": SSLRequest, answered by S or N.
_SSL_REQUEST = struct.pack("!ii", 8, 80_877_103)


async def examine_handshake(error: BaseException) -> HandshakeError | None:
    """Return the TLS error among the causes of *error*, with the server's certificate or alert; ``None`` if none is."""
    failure = next((link for link in links(error) if isinstance(link, HandshakeError)), None)
    if failure is None:
        return None
    server = failure.server
    try:
        async with asyncio.timeout(_TIMEOUT_SECONDS):
            if any(isinstance(link, ssl.SSLCertVerificationError) for link in links(error)):
                return HandshakeError(server, f"{failure} ({await _certificate(server)})", failure.remedy)
            if server.tls and any(isinstance(link, CUT_SHORT) for link in links(error)):
                # Until a client sends, it receives the server's alert; afterwards it may receive a reset.
                await _handshake(server, _context(server), read=True)
    except ssl.SSLError as alert:
        return refused(alert.reason or "", server)
    except (OSError, ValueError):
        pass
    return failure


async def _certificate(server: Server) -> str:
    """Return the subject, hosts, issuer and end of the server's certificate.

    Python decodes only a trusted certificate: the first connection fetches it, and the second trusts it.
    """
    context = _context(server)
    context.load_verify_locations(cadata=(await _handshake(server, context)).getpeercert(binary_form=True) or b"")
    context.verify_flags |= ssl.VerifyFlags(_PARTIAL_CHAIN | _NO_CHECK_TIME)
    context.verify_mode = ssl.CERT_REQUIRED
    found: dict[str, Any] = (await _handshake(server, context)).getpeercert() or {}
    hosts = ", ".join(name for _, name in found.get("subjectAltName", ())[:5])
    ends = datetime.fromtimestamp(ssl.cert_time_to_seconds(found["notAfter"]), UTC)
    subject, issuer = _name(found.get("subject")), _name(found.get("issuer"))
    return f"{subject}, for {hosts or 'no host'}, signed by {issuer}, valid until {ends:%Y-%m-%d %H:%M:%S}Z"


async def _handshake(server: Server, context: ssl.SSLContext, *, read: bool = False) -> ssl.SSLObject:
    plain = server.kind == "postgresql"
    reader, writer = await asyncio.open_connection(server.host, server.port, ssl=None if plain else context)
    try:
        if plain:
            writer.write(_SSL_REQUEST)
            if await reader.read(1) != b"S":
                raise ConnectionError("no TLS there")
            await writer.start_tls(context, server_hostname=server.host)
        if read:
            await reader.read(1)
        return writer.get_extra_info("ssl_object")  # type: ignore[no-any-return]
    finally:
        writer.transport.abort()


def _context(server: Server) -> ssl.SSLContext:
    """Return a context that accepts any certificate, with the client certificate of the URL."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    _, cert, key = server.names
    if file := server.given.get(cert):
        password = server.given.get("sslpassword", "")
        context.load_cert_chain(file, server.given.get(key) or None, lambda: password)
    return context


def _name(name: Any) -> str:  # noqa: ANN401 - ssl's nested tuples
    """Return the common name, or the organization."""
    parts = {key: value for relative in name or () for key, value in relative}
    return str(parts.get("commonName") or parts.get("organizationName") or "no name")
