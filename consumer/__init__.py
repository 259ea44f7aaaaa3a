"""Closes out agent runs: incident, policy evaluation and trace in one transaction, events after the commit."""

from consumer.assembly import create_transaction_coordinator, get_transaction_coordinator
from consumer.attempt import TransactionResult
from consumer.errors import TransactionFailed
from consumer.phases import TransactionPhase
from consumer.transaction import RunCompletionTransaction
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
