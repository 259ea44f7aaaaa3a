"""``scripts/screenshots``: console and dashboard over a worker with traffic, as a person sees them."""
