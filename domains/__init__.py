"""The three domains of a run's close-out, and the database they share."""
