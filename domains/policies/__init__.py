"""Policies: rules over completed runs, written in CEL, kept as rows."""
