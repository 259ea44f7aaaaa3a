"""Keeps the tables consistent and small: invariants, reconcile and prune; imports ``closeout`` and below."""
