"""Screenshots of the console while a worker processes generated traffic."""
