"""The schema, the building blocks of statements, and the detection of poolers."""
