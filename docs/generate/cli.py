"""The page of the command line. Its arguments come from the parser: `--help` is laid out otherwise in each Python."""

from __future__ import annotations

import argparse
import os
import textwrap
from typing import Final
from unittest import mock

from docs.docstrings import escaped
from docs.generate.markdown import table
from regkit.cli import _parser

_WIDTH: Final = 84
_INTRODUCTION: Final = """# On the command line

`regkit COMMAND --help` says the same in a terminal, and `python -m regkit` is `regkit`.
"""


def cli() -> str:
    """The page."""
    whole = _parser()
    (commands,) = (action for action in whole._actions if isinstance(action, argparse._SubParsersAction))
    summaries = {choice.dest: choice.help or "" for choice in commands._choices_actions}
    rows = [[f"[`regkit {name}`](#regkit-{name})", summary] for name, summary in summaries.items()]
    parts = [_INTRODUCTION, table(["command", "what for"], rows), ""]
    parts += [f"```text\n{(whole.epilog or '').strip()}\n```\n"]
    parts += [_command(name, parser) for name, parser in commands.choices.items()]
    return "\n".join(parts)


def _command(name: str, parser: argparse.ArgumentParser) -> str:
    with mock.patch.dict(os.environ, COLUMNS="1000"):  # one line, which versions of Python break at different places
        usage = " ".join(parser.format_usage().removeprefix("usage: ").split())
    lines = textwrap.fill(usage, _WIDTH, subsequent_indent="    ", break_on_hyphens=False)
    parts = [f"## regkit {name}", escaped(" ".join((parser.description or "").split())), f"```text\n{lines}\n```"]
    rows = [[_spelling(action), action.help or ""] for action in parser._actions if action.dest != "help"]
    if rows:
        parts.append(table(["argument", "meaning"], rows))
    return "\n\n".join(parts) + "\n"


def _spelling(action: argparse.Action) -> str:
    """How an argument is written: `-o, --output FILE`."""
    value = "" if action.nargs == 0 else str(action.metavar or action.dest.upper())
    return f"`{' '.join(filter(None, [', '.join(action.option_strings), value]))}`"
