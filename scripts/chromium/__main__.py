"""Installs Chromium if it is missing, and prints its path."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from servers.process import ServerError  # noqa: E402

from chromium.chromium import find_chromium  # noqa: E402

if __name__ == "__main__":
    try:
        print(f"Chromium: {find_chromium()}")
    except ServerError as error:
        print(f"chromium: {error}", file=sys.stderr)
        sys.exit(1)
