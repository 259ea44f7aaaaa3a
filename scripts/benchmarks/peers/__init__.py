"""The same work a message at a time, written as each library's documentation advises and as fast as that allows."""
