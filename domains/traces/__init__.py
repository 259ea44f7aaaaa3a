"""Traces: what the run did, step by step, completed when the run is."""
