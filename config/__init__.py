"""Settings and logs: the only place where the environment is read."""
