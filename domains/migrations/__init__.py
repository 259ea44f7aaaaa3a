"""The schema's versions, run by ``closeout migrate``."""
