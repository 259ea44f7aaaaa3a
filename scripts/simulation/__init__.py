"""A day of many runs on a cluster, minute by minute."""
