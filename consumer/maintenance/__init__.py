"""Keeping the tables right and small: invariants, reconcile and prune; imports ``outbox`` and below."""
