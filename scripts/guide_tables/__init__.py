"""``scripts/guide-tables``: the tables of the guides that are generated from the code."""
