"""Traces: the steps of a run, completed with the run."""
