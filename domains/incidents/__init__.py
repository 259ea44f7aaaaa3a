"""Incidents: every run gets one, success included, unless a policy prevents it."""
