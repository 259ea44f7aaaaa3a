"""Closes out agent runs: incident, policy evaluation and trace in one transaction, events after the commit."""

from consumer.assembly import create_transaction_coordinator, get_transaction_coordinator
from consumer.closeout.attempt import TransactionResult
from consumer.closeout.transaction import RunCompletionTransaction
from consumer.errors import TransactionFailed
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
