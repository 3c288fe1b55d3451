"""The command line: `regkit kinds`, `regkit check`, `regkit plan`, `regkit schema`."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import nn

from regkit.document import load
from regkit.errors import PluginError, RegkitError
from regkit.plan import resolve
from regkit.registry import CONTRACTS, Entry, Registry, default
from regkit.schema import schema

_KINDS = """Every kind that a document may name, from everything installed: its options (with = where one has a
default), what it means, and the distribution it comes from."""

_CHECK = """Read documents and tell everything that is wrong with them, each with its line and column. Needs no model.
Exit status: 0 if all are valid, 1 if one is not."""

_PLAN = """Bind a document to a model and print what would be optimized: a row for each weight or output that a rule
acts on, and how it is reached. Nothing is trained and nothing is changed."""

_SCHEMA = """The JSON Schema of documents, with every installed kind in it. Save it beside your documents and point
their "$schema" at it: an editor then completes and checks them as you type."""

_EXAMPLES = """examples:
  regkit kinds --family constraint
  regkit check specs/*.json
  regkit plan spec.json --model mypackage.models:make_model
  regkit schema -o regkit.schema.json
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, or 1 with the error on standard error."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.command(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has seen enough (`regkit kinds | head`); Python would complain once more when it closes the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (RegkitError, OSError) as error:
        print(f"regkit: {error}", file=sys.stderr)
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="regkit",
        description="Regularize recurrent layers of existing PyTorch models from a JSON document.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"regkit {metadata.version('regkit')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    kinds = commands.add_parser("kinds", help="list every kind that is installed", description=_KINDS)
    kinds.add_argument("--family", choices=list(CONTRACTS), help="only this family")
    kinds.set_defaults(command=_kinds)

    check = commands.add_parser("check", help="tell what is wrong with documents", description=_CHECK)
    check.add_argument("spec", nargs="+", help="a JSON document")
    check.set_defaults(command=_check)

    plan = commands.add_parser("plan", help="show what a document does to a model", description=_PLAN)
    plan.add_argument("spec", help="a JSON document")
    plan.add_argument(
        "--model",
        required=True,
        metavar="MODULE:NAME",
        help="an nn.Module, or a function without arguments that returns one; found from the current folder",
    )
    plan.set_defaults(command=_plan)

    write = commands.add_parser("schema", help="print the JSON Schema of documents", description=_SCHEMA)
    write.add_argument("-o", "--output", metavar="FILE", help="write it to a file")
    write.set_defaults(command=_schema)
    return parser


def _kinds(options: argparse.Namespace) -> int:
    registry = default()
    entries = registry.entries(options.family) if options.family else registry.entries()
    blocks = [f"{e.family}: {e.name}({_options(e)})  from {e.origin}\n    {e.meaning}" for e in entries]
    print("\n".join(blocks))
    return 0


def _options(entry: Entry) -> str:
    """The options, those that must be given first, the others as `name=default`."""
    fields = {name: field for name, field in entry.kind.model_fields.items() if name != "kind"}
    required = [name for name, field in fields.items() if field.is_required()]
    defaults = [f"{name}={field.get_default()}" for name, field in fields.items() if not field.is_required()]
    return ", ".join([*required, *defaults])


def _check(options: argparse.Namespace) -> int:
    registry = default()
    return max([_checked(path, registry) for path in options.spec])


def _checked(path: str, registry: Registry) -> int:
    try:
        spec = load(Path(path), registry=registry)
    except RegkitError as error:
        print(error, file=sys.stderr)
        return 1
    count = len(spec.rules)
    print(f"{path}: valid, {count} rule{'' if count == 1 else 's'}")
    return 0


def _plan(options: argparse.Namespace) -> int:
    spec = load(Path(options.spec))
    print(resolve(_model(options.model), spec))
    return 0


def _model(place: str) -> nn.Module:
    """The model at `package.module:name`."""
    module_name, colon, name = place.partition(":")
    if not colon or not module_name or not name:
        raise PluginError(f"--model takes package.module:name, got {place!r}")
    sys.path.insert(0, "")  # as `python -m` does
    try:
        made: Any = importlib.import_module(module_name)
        for part in name.split("."):
            made = getattr(made, part)
        model = made if isinstance(made, nn.Module) else made()
    except (Exception, SystemExit) as error:  # it runs the user's code: anything can come out
        raise PluginError(f"--model {place}: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise PluginError(f"--model {place} gives {type(model).__name__}, not an nn.Module")
    return model


def _schema(options: argparse.Namespace) -> int:
    text = json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"
    if options.output is None:
        sys.stdout.write(text)
    else:
        Path(options.output).write_text(text, encoding="utf-8")
        print(f"wrote {options.output}")
    return 0
