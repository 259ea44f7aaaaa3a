"""The console: read-only pages over the flow and over single runs, served by the worker itself.

It must never disturb the worker. What it shows comes from three places: counters that the worker keeps anyway, looked
at every two seconds (``history.py``); the database, in two sessions of its own (``database.py``); the broker's queue
depths, over a connection of its own (``depths.py``). The last two are asked only while somebody looks, and all viewers
share one answer (``readings.py``).
"""
