"""URLs that stand in mounted files, as Kubernetes and others hand out passwords and change them."""

from pathlib import Path


def read_secret(variable: str, path: str) -> tuple[str, str | None]:
    """Return the text of the file at *path*, which *variable* names, and what is wrong with it, if anything is."""
    if "://" in path:  # the URL itself, with its password
        return "", f"{variable}: found a URL; expected the path of a file that holds it"
    try:
        secret = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:  # ValueError: not UTF-8
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        return "", f"{variable}: cannot read {path}: {reason}; it must hold the URL and nothing else"
    if not secret:
        return "", f"{variable}: {path} is empty; it must hold the URL"
    return secret, None
