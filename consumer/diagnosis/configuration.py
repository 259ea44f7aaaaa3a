"""The settings: every fault, and what is allowed and rarely meant."""

import re
from collections.abc import Mapping
from urllib.parse import unquote, urlsplit

from config.settings import Settings
from config.urls import parameters
from consumer.diagnosis.check import Check, ok, problem, warning

_LOOPBACK = re.compile(r"/|localhost(:|$)|127\.|\[?::1\]?(:\d+$|$)")


def examine_configuration(settings: Settings, faults: Mapping[str, str]) -> list[Check]:
    """Return what is to be said of *settings*; *faults* are by field, and their fields hold stand-ins."""
    found = [problem("settings", fault, "see config/README.md") for fault in faults.values()]
    found += [warning("settings", words, "correct it, or leave it out") for words in settings.warnings]
    found = found or [ok("settings", "all as they must be")]
    return [*found, *_encryption(settings, faults), *_path(settings, faults)]


def _encryption(settings: Settings, faults: Mapping[str, str]) -> list[Check]:
    """Say who could listen to what is sent to each server, or stand in for it; on one machine nobody."""
    found = []
    if "database_url" not in faults:
        url = settings.database_url.get_secret_value()
        mode = parameters(url).get("sslmode", "prefer")
        words = f"DATABASE_URL, sslmode={mode}: {_MODES_IN_WORDS[mode]}"
        remedy = "write sslmode=verify-full&sslrootcert=FILE, the authority that signed the server's certificate"
        safe = mode == "verify-full" or _stays_here(url)
        found.append(ok("encryption", words) if safe else warning("encryption", words, remedy))
    if "amqp_url" not in faults:
        url = settings.amqp_url.get_secret_value()
        scheme = url.partition("://")[0]
        words = "encrypted, certificate and host are checked" if scheme == "amqps" else "not encrypted"
        safe = scheme == "amqps" or _stays_here(url)
        remedy = "write amqps://, with ?cafile=FILE, the authority that signed the server's certificate"
        words = f"AMQP_URL, {scheme}://: {words}"
        found.append(ok("encryption", words) if safe else warning("encryption", words, remedy))
    return found


_MODES_IN_WORDS = {
    "disable": "not encrypted",
    "allow": "encrypted only where the server insists, and nothing is checked",
    "prefer": "encrypted if the server can, and nothing is checked",
    "require": "encrypted; whose certificate it is, is not checked",
    "verify-ca": "encrypted, the certificate is checked, the host in it is not",
    "verify-full": "encrypted, certificate and host are checked",
}


def _stays_here(url: str) -> bool:
    """Say whether all hosts of *url* are this machine: loopback, or a socket in a folder."""
    hosts = (urlsplit(url).netloc.rpartition("@")[2] or parameters(url).get("host", "/")).split(",")
    return all(_LOOPBACK.match(unquote(host)) for host in hosts)


def _path(settings: Settings, faults: Mapping[str, str]) -> list[Check]:
    if faults.keys() & {"transaction_coordinator_enabled", "transaction_coordinator_tenants"}:
        return []
    found = []
    if not settings.transaction_coordinator_enabled:
        words = "TRANSACTION_COORDINATOR_ENABLED is false: runs are closed out with three separate writes"
        found.append(warning("coordinator", words, "set it to true, here and where the worker runs"))
    elif settings.transaction_coordinator_tenants:
        named = ", ".join(sorted(settings.transaction_coordinator_tenants))
        words = f"on for {named} only; all other tenants' runs are closed out without atomicity"
        found.append(warning("coordinator", words, "end the rollout: empty TRANSACTION_COORDINATOR_TENANTS"))
    else:
        found.append(ok("coordinator", "on for all tenants: a run is closed out in one transaction"))
    if settings.legacy_fallback_enabled:
        words = "LEGACY_FALLBACK_ENABLED is true: a run whose transaction fails may end up half closed out"
        found.append(warning("fallback", words, "set it to false unless you watch closeout_legacy_fallbacks_total"))
    return found
