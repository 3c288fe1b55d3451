"""Write the generated pages, or tell which of them are out of date."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from docs.generate import pages

FOLDER = Path(__file__).parents[1]


def main(arguments: Sequence[str] | None = None, folder: Path = FOLDER) -> int:
    """Write the pages into a folder. With --check write nothing, and return 1 where a page is out of date."""
    parser = argparse.ArgumentParser(prog="python -m docs.generate", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a page is out of date")
    check = parser.parse_args(arguments).check
    stale = {path: text for path, text in pages().items() if _bytes(folder / path) != text.encode()}
    for path, text in stale.items():
        print(f"{folder.name}/{path} {'is out of date' if check else 'written'}")
        if not check:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(text.encode())
    if check and stale:
        print("run `python -m docs.generate` and commit what it writes", file=sys.stderr)
    return int(check and bool(stale))


def _bytes(file: Path) -> bytes | None:
    return file.read_bytes() if file.exists() else None


if __name__ == "__main__":
    sys.exit(main())
