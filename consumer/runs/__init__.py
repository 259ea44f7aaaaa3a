"""Stored runs for people and policies: lookup, pages, and the run as conditions see it."""
