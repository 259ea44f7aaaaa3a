"""The command behind scripts/services."""

import sys
from pathlib import Path

# By path, not by PYTHONPATH: the command that `run` starts would inherit that.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from servers.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
