"""The version of the installed distribution."""


def installed_version() -> str:
    """Return the version of the installed distribution; ``unknown`` if it is not installed."""
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415 - 30 ms, and help needs no version

    try:
        return version("closeout")
    except PackageNotFoundError:
        return "unknown"
