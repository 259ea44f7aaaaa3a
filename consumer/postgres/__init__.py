"""PostgreSQL: the engine, the transaction at the driver, readiness and privileges; imports ``errors``."""
