"""The programs that the servers run, from PyPI or Debian's packages."""
