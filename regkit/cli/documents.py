"""`regkit check`, `regkit plan`, `regkit schema`: the commands about documents."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from torch import nn

import regkit
from regkit import PluginError, Registry, RegkitError
from regkit.cli.layout import as_json, counted
from regkit.errors import printable


def check(options: argparse.Namespace) -> int:
    """Print every mistake in each document."""
    registry = Registry()
    return max([_checked(path, registry, options.strict) for path in options.spec])


def _checked(path: str, registry: Registry, strict: bool) -> int:
    try:
        spec = regkit.load(Path(path), registry=registry, strict=strict)
    except RegkitError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{printable(str(path))}: valid, {counted(len(spec.rules), 'rule')}")
    return 0


def plan(options: argparse.Namespace) -> int:
    """Print the plan of a document for a model."""
    made = _object_at(options.model)  # first, for its module may register kinds
    spec = regkit.load(Path(options.spec))
    print(regkit.resolve(_model(options.model, made), spec))
    return 0


def _object_at(place: str) -> Any:
    """The object at `package.module:name`."""
    module_name, colon, name = place.partition(":")
    if not colon or not module_name or not name:
        raise PluginError(f"--model takes package.module:name, got {place!r}")
    sys.path.insert(0, "")  # as `python -m` does
    try:
        found: Any = importlib.import_module(module_name)
        for part in name.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as error:  # it runs the user's code: anything can come out
        raise PluginError(f"--model {place}: {type(error).__name__}: {error}") from error
    return found


def _model(place: str, found: Any) -> nn.Module:
    """The model at a place: the object found there, or the result of the function found there."""
    try:
        model = found if isinstance(found, nn.Module) else found()
    except (Exception, SystemExit) as error:  # as above
        raise PluginError(f"--model {place}: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise PluginError(f"--model {place} gives {type(model).__name__}, not an nn.Module")
    return model


def schema(options: argparse.Namespace) -> int:
    """Print the JSON Schema, or write the schema to a file."""
    made = regkit.schema(Registry())
    if options.output is None:
        print(as_json(made))
    else:
        Path(options.output).write_text(json.dumps(made, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"wrote {printable(str(options.output))}")
    return 0
