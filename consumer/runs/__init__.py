"""Reads stored runs: lookup, pages of keys, and runs as conditions see them; imports ``phases``."""
