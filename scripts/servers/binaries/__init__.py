"""The programs that the servers run, from PyPI or from Debian packages."""
