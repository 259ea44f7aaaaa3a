"""The versions of the schema, and ``closeout migrate``, which applies them."""
