"""The checks of ``closeout doctor``: settings, database and broker; read-only. Imports ``outbox`` and below."""
