"""Policies: rules on completed runs, written in CEL and stored as rows."""
