"""``scripts/screenshots``: the console over a worker with traffic, as a person sees it."""
