"""Benchmarks behind ``scripts/bench``: Closeout, its peers and its limits, on private servers."""
