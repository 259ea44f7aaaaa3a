"""CEL conditions: compiling, what they read, and what they may cost."""
