"""The schema's name, the building blocks of statements, and what a pooler changes."""
