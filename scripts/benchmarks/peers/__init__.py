"""The same work, one message at a time, written and tuned as each library's documentation advises."""
