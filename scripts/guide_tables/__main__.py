"""Write the generated tables into the guides, or list the guides that are stale."""

import argparse
import sys
from pathlib import Path

from guide_tables.tables import GUIDES, filled

ROOT = Path(__file__).parents[2]


def main() -> int:
    """Return the exit status: 1 if ``--check`` finds a stale guide."""
    parser = argparse.ArgumentParser(prog="scripts/guide-tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a guide is stale")
    check = parser.parse_args().check
    texts = {name: (ROOT / name).read_text() for name in GUIDES}
    stale = {name: new for name, text in texts.items() if (new := filled(text)) != text}
    for name, new in stale.items():
        print(f"{name}: stale" if check else f"{name}: written")
        if not check:
            (ROOT / name).write_text(new)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
