"""The three domains of a close-out, and the database they share; imports nothing else of this project."""
