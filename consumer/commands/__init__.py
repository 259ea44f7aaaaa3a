"""The commands that are more than a call: what they print is their work."""
