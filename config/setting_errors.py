"""Error messages for invalid settings."""

from collections.abc import Mapping
from typing import Any

from config.urls import PARAMETER_FAULT


def describe_fault(name: str, fault: Mapping[str, Any], *, secret: bool) -> str:
    """Return *fault* as one line: the variable, the value found unless it is secret, and what is expected."""
    variable = name.upper()
    if fault["type"] == "missing":
        return f"{variable}: not set; expected {_EXPECTED[name]}"
    if fault["type"] == PARAMETER_FAULT:
        return f"{variable}: {fault['msg']}"
    # A URL in another variable is a mistake, and may contain a password.
    kept_secret = secret or "://" in str(fault["input"])
    found = "a secret value" if kept_secret else repr(fault["input"])[:80]
    hint = _ENCODED if secret else ""
    return f"{variable}: found {found}; expected {_EXPECTED.get(name) or _expected(fault)}{hint}"


_EXPECTED = {
    "database_url": "postgresql://user:password@host/database, with libpq's parameters such as ?sslmode=require",
    "amqp_url": "amqp://user:password@host:5672/vhost, or amqps:// for TLS",
    "transaction_coordinator_tenants": "tenant ids of A-Z a-z 0-9 . _ - : @ + ~ = separated by commas",
}
# The usual mistake in a URL that looks valid.
_ENCODED = "; encode / ? # @ in a password as %2F %3F %23 %40"


def _expected(fault: Mapping[str, Any]) -> str:
    kind, context = str(fault["type"]), fault.get("ctx", {})
    if kind.startswith("bool"):
        return "true or false"
    if kind.startswith("int"):
        return "a whole number"
    if kind.startswith("float"):
        return "a number"
    if kind == "literal_error":
        return f"one of {context['expected']}"
    for bound, phrase in (("ge", "at least"), ("le", "at most"), ("gt", "above")):
        if bound in context:
            return f"{phrase} {context[bound]}"
    return str(fault["msg"])
