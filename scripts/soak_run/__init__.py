"""``scripts/soak``: workers under load while everything around them is killed, and then the books are checked."""
