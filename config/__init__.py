"""Settings and logs: the only package that reads the environment; imports nothing else of this project."""
