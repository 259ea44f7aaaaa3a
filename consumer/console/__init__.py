"""The console: read-only pages about the flow and about single runs, served by the worker.

It must never disturb the worker. Its data has three sources: the worker's counters, sampled every two seconds
(``history.py``); the database, in two dedicated sessions (``queries.py``); and queue depths, over a dedicated
connection (``queue_depths.py``). The last two are read only while a page is open, and all viewers share one result
(``shared_reads.py``). Imports ``parked``, ``outbox``, ``runs`` and below.
"""
