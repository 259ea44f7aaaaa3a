"""Closing out runs: claim, transaction, retries and the legacy path; imports ``outbox`` and below."""
