"""`regkit new`: the distribution of a plugin, written."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from regkit.scaffold import scaffold


def new(options: argparse.Namespace) -> int:
    """Write it, and tell how to go on."""
    folder = Path(options.folder or options.name)
    print("wrote", *(f"  {path}" for path in scaffold(options.name, options.family or "penalty", folder)), sep="\n")
    commands = (f"cd {shlex.quote(str(folder))}", 'python -m pip install -e ".[test]"', "python -m pytest")
    print("\nnow", *(f"  {command}" for command in commands), sep="\n")
    return 0
