"""Validates the URLs of both servers, and the TLS files that they name.

The files are checked here because neither client names a file that it cannot read.
"""

import os
import random
import ssl
from base64 import b64decode
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from pydantic import SecretStr
from pydantic_core import PydanticCustomError

# The type of a fault in a URL's parameter. Its text may be printed, because a path is not secret.
PARAMETER_FAULT = "url_parameter"

SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
# From require on, the server's certificate is verified if sslrootcert is given.
CHECKING_MODES = ("require", "verify-ca", "verify-full")
# libpq's name for the system's authorities.
SYSTEM_ROOTS = "system"
# libpq's parameter that spreads sessions over several hosts.
BALANCE = "load_balance_hosts"
_AMQP_TLS = ("cafile", "capath", "cadata", "certfile", "keyfile", "no_verify_ssl")


def checked_database_url(value: SecretStr) -> SecretStr:
    """Return *value* in asyncpg's form; raise ``ValueError`` if it is invalid, naming an invalid parameter."""
    url = _url(value)
    scheme, separator, rest = url.partition("://")
    if scheme not in {"postgresql", "postgres", "postgresql+asyncpg"} or not separator:
        raise ValueError("not a PostgreSQL URL")
    if "," not in rest:  # a URL parser does not support several hosts
        _ = urlsplit(f"postgresql://{rest}").port  # raises ValueError for an invalid port
    _check_database(parameters(url))
    return SecretStr(f"postgresql://{rest}")


def checked_amqp_url(value: SecretStr) -> SecretStr:
    """Return *value* in aiormq's form; raises as :func:`checked_database_url` does."""
    url = _url(value)
    parts = urlsplit(url)
    if parts.scheme not in {"amqp", "amqps"} or not parts.hostname or parts.port == 0:
        raise ValueError("not an AMQP URL")
    _check_amqp(parts.scheme, parameters(url))
    return SecretStr(url)


def parameters(url: str) -> dict[str, str]:
    """Return the query parameters of *url*, the last value of each name; raise ``ValueError`` for an invalid query."""
    query = url.partition("?")[2]
    return dict(parse_qsl(query, keep_blank_values=True, strict_parsing=True)) if query else {}


def in_connect_order(url: str) -> str:
    """Return *url* with its hosts in the order in which to try them: random with ``load_balance_hosts=random``.

    The parameter is libpq's (version 16). asyncpg does not know it and would send it to the server, so it is removed.
    """
    balance = parameters(url).get(BALANCE)
    if balance is None:
        return url
    head, separator, query = url.partition("?")
    if balance == "random":
        scheme, _, rest = head.partition("://")
        authority, slash, database = rest.partition("/")
        user, at, hosts = authority.rpartition("@")
        named = hosts.split(",")
        random.shuffle(named)
        head = f"{scheme}://{user}{at}{','.join(named)}{slash}{database}"
    kept = [part for part in query.split("&") if not part.startswith(f"{BALANCE}=")]
    return f"{head}{separator if kept else ''}{'&'.join(kept)}"


def _url(value: SecretStr) -> str:
    """Return the URL without surrounding white space, which templates and files add."""
    url = value.get_secret_value().strip()
    # The clients end a URL at # and would connect elsewhere; a second line or a NUL is a mistake.
    if "#" in url or not url.isprintable():
        raise ValueError("not a URL")
    return url


def _check_database(given: Mapping[str, str]) -> None:
    """Raise for parameters that libpq refuses, or that asyncpg would refuse at each connection with a worse error."""
    if (balance := given.get(BALANCE, "disable")) not in {"disable", "random"}:
        raise _fault(f"{BALANCE}={balance[:40]}", "expected disable or random")
    if balance == "random" and "host" in given:
        raise _fault(f"{BALANCE}=random", "needs the hosts before the database's name: //host1:5432,host2:5432/name")
    mode = given.get("sslmode", "prefer")
    if mode not in SSL_MODES:
        raise _fault(f"sslmode={mode[:40]}", f"expected {', '.join(SSL_MODES[:-1])} or {SSL_MODES[-1]}")
    # libpq's variables and default files apply if the URL has no parameter.
    home = Path.home() / ".postgresql"
    roots = given.get("sslrootcert") or os.environ.get("PGSSLROOTCERT") or (home / "root.crt").exists()
    if given.get("sslrootcert") == SYSTEM_ROOTS:
        if mode != "verify-full":
            raise _fault("sslrootcert=system", "needs sslmode=verify-full, because anyone can get such a certificate")
    elif given.get("sslrootcert"):
        _check_file(given, "sslrootcert", _load_authorities)
    elif mode.startswith("verify") and not roots:
        raise _fault(f"sslmode={mode}", "needs sslrootcert=FILE with the signing authority, or sslrootcert=system")
    if given.get("sslcrl"):
        _check_file(given, "sslcrl", _load_authorities)
    if given.get("sslcert") and not given.get("sslkey"):
        key = os.environ.get("PGSSLKEY") or str(home / "postgresql.key")
        given = {**given, "sslkey": key if Path(key).exists() else ""}
    _check_identity(given, "sslcert", "sslkey", password=given.get("sslpassword", ""))


def _check_amqp(scheme: str, given: Mapping[str, str]) -> None:
    if "cacertfile" in given:  # RabbitMQ's own name for it; the client ignores it
        raise _fault("cacertfile", "is an unknown parameter; use cafile")
    if scheme == "amqp" and (meant := [name for name in _AMQP_TLS if name in given]):
        raise _fault(meant[0], "is for TLS, but amqp:// is without TLS; use amqps://")
    # The client treats any other value as yes, even "no" and "false".
    if given.get("no_verify_ssl", "0") != "0":
        raise _fault("no_verify_ssl", "disables certificate verification and is not allowed; set cafile=CA")
    if given.get("cafile"):
        _check_file(given, "cafile", _load_authorities)
    if given.get("capath") and not Path(given["capath"]).is_dir():
        raise _fault(f"capath={given['capath'][:200]}", "is not a folder")
    if given.get("cadata"):
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=b64decode(given["cadata"]))
        except (ssl.SSLError, ValueError) as error:
            raise _fault("cadata", "contains no certificate; expected DER in base64") from error
    _check_identity(given, "certfile", "keyfile", password="")


def _check_file(given: Mapping[str, str], name: str, load: Callable[[str], None]) -> None:
    path = given[name]
    try:
        with Path(path).open("rb"):
            pass
        load(path)
    except ssl.SSLError as error:
        raise _fault(f"{name}={path[:200]}", "contains no PEM certificate") from error
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        reason = error.strerror if isinstance(error, OSError) else "no path"
        raise _fault(f"{name}={path[:200]}", f"cannot be read: {reason}") from error


def _load_authorities(path: str) -> None:
    ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=path)


def _check_identity(given: Mapping[str, str], cert: str, key: str, *, password: str) -> None:
    """Raise unless certificate and key can be read and match; the key may be in the certificate's file."""
    if not given.get(cert):
        if given.get(key):
            raise _fault(key, f"is given without {cert}")
        return
    _check_file(given, cert, lambda _path: None)
    if given.get(key):
        _check_file(given, key, lambda _path: None)
    try:
        # Without a password OpenSSL would prompt on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(given[cert], given.get(key) or None, lambda: password)
    except ssl.SSLError as error:
        both = f"{cert}={given[cert][:200]} and {key}={(given.get(key) or given[cert])[:200]}"
        if error.reason == "KEY_VALUES_MISMATCH":
            raise _fault(both, "do not match") from error
        needs = "a certificate and its key, in PEM and " + ("without" if not password else "with that") + " password"
        raise _fault(both, f"cannot be used; expected {needs}") from error


def _fault(what: str, fault: str) -> PydanticCustomError:
    return PydanticCustomError(PARAMETER_FAULT, "{what} {fault}", {"what": what, "fault": fault})
