"""Closes out agent runs: incident, policy evaluation and trace in one transaction, events after the commit.

The names below are loaded when they are first used, so that importing one module does not load the whole application.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from consumer.closeout.outcome import TransactionFailed, TransactionResult
    from consumer.closeout.transaction import RunCompletionTransaction
    from consumer.coordinator import create_transaction_coordinator, get_transaction_coordinator
    from consumer.phases import TransactionPhase
    from domains.result import DomainResult

__all__ = [
    "DomainResult",
    "RunCompletionTransaction",
    "TransactionFailed",
    "TransactionPhase",
    "TransactionResult",
    "create_transaction_coordinator",
    "get_transaction_coordinator",
]

_MODULES = {
    "DomainResult": "domains.result",
    "RunCompletionTransaction": "consumer.closeout.transaction",
    "TransactionFailed": "consumer.closeout.outcome",
    "TransactionPhase": "consumer.phases",
    "TransactionResult": "consumer.closeout.outcome",
    "create_transaction_coordinator": "consumer.coordinator",
    "get_transaction_coordinator": "consumer.coordinator",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
