"""The soak test behind ``scripts/soak``: random faults under load, then a check of the invariants."""
