"""``scripts/demo``: runs published, closed out, read back and checked, on private servers."""
