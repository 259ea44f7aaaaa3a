"""Checks of the settings: every fault, and settings that are allowed but rarely intended."""

import re
from collections.abc import Mapping
from urllib.parse import unquote, urlsplit

from config.settings import Settings
from config.urls import parameters
from consumer.diagnosis.check import Check, ok, problem, warning

_LOOPBACK = re.compile(r"/|localhost(:|$)|127\.|\[?::1\]?(:\d+$|$)")


def examine_configuration(settings: Settings, faults: Mapping[str, str]) -> list[Check]:
    """Return the checks of *settings*; *faults* are by field, and invalid fields have defaults."""
    found = [problem("settings", fault, "see config/README.md") for fault in faults.values()]
    found += [warning("settings", message, "correct it, or remove it") for message in settings.warnings]
    found = found or [ok("settings", "valid")]
    return [*found, *_encryption(settings, faults), *_path(settings, faults)]


def _encryption(settings: Settings, faults: Mapping[str, str]) -> list[Check]:
    """Check the encryption of both connections; a connection within this machine needs none."""
    found = []
    if "database_url" not in faults:
        url = settings.database_url.get_secret_value()
        mode = parameters(url).get("sslmode", "prefer")
        message = f"DATABASE_URL, sslmode={mode}: {_SSL_MODES[mode]}"
        remedy = "use sslmode=verify-full&sslrootcert=FILE with the authority that signed the server's certificate"
        safe = mode == "verify-full" or _stays_here(url)
        found.append(ok("encryption", message) if safe else warning("encryption", message, remedy))
    if "amqp_url" not in faults:
        url = settings.amqp_url.get_secret_value()
        scheme = url.partition("://")[0]
        message = "encrypted; certificate and host name verified" if scheme == "amqps" else "not encrypted"
        safe = scheme == "amqps" or _stays_here(url)
        remedy = "use amqps:// and ?cafile=FILE with the authority that signed the server's certificate"
        message = f"AMQP_URL, {scheme}://: {message}"
        found.append(ok("encryption", message) if safe else warning("encryption", message, remedy))
    return found


_SSL_MODES = {
    "disable": "not encrypted",
    "allow": "encrypted only if the server requires it; certificate not verified",
    "prefer": "encrypted if the server supports it; certificate not verified",
    "require": "encrypted; server certificate not verified",
    "verify-ca": "encrypted; certificate verified, host name not verified",
    "verify-full": "encrypted; certificate and host name verified",
}


def _stays_here(url: str) -> bool:
    """Return whether all hosts of *url* are this machine: loopback, or a socket in a folder."""
    hosts = (urlsplit(url).netloc.rpartition("@")[2] or parameters(url).get("host", "/")).split(",")
    return all(_LOOPBACK.match(unquote(host)) for host in hosts)


def _path(settings: Settings, faults: Mapping[str, str]) -> list[Check]:
    if faults.keys() & {"transaction_coordinator_enabled", "transaction_coordinator_tenants"}:
        return []
    found = []
    if not settings.transaction_coordinator_enabled:
        message = "TRANSACTION_COORDINATOR_ENABLED is false: each run is closed out with three separate writes"
        found.append(warning("coordinator", message, "set it to true, here and where the worker runs"))
    elif settings.transaction_coordinator_tenants:
        named = ", ".join(sorted(settings.transaction_coordinator_tenants))
        message = f"enabled for {named} only; runs of all other tenants are closed out without atomicity"
        found.append(warning("coordinator", message, "to end the rollout, empty TRANSACTION_COORDINATOR_TENANTS"))
    else:
        found.append(ok("coordinator", "enabled for all tenants: a run is closed out in one transaction"))
    if settings.legacy_fallback_enabled:
        message = "LEGACY_FALLBACK_ENABLED is true: a run whose transaction fails may be partly closed out"
        found.append(warning("fallback", message, "set it to false unless you watch closeout_legacy_fallbacks_total"))
    return found
