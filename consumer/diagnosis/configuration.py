"""The settings: every fault, and what is allowed and rarely meant."""

from collections.abc import Mapping

from config.settings import Settings
from consumer.diagnosis.check import Check, ok, problem, warning


def examine_configuration(settings: Settings, faults: Mapping[str, str]) -> list[Check]:
    """Return what is to be said of *settings*; *faults* are by field, and their fields hold stand-ins."""
    found = [problem("settings", fault, "see the README's table of settings") for fault in faults.values()]
    found += [warning("settings", words, "correct it, or leave it out") for words in settings.warnings]
    return [*(found or [ok("settings", "all as they must be")]), *_path(settings, faults)]


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
