"""Spans of a run's way, if OpenTelemetry is installed and configured."""
