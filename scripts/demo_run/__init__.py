"""The demonstration behind ``scripts/demo``: generated runs are published to a worker and checked."""
