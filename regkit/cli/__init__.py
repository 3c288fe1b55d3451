"""The command line: one room for each noun, imported when a command of that noun is asked for."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import Final, TypeAlias

import regkit
from regkit.cli.plugin_warnings import plugin_warnings
from regkit.cli.scaffold import TEMPLATES
from regkit.errors import RegkitError
from regkit.registry.names import FAMILIES

_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""The subparsers of the command line."""

_EXAMPLES: Final = """examples:
  regkit kinds max_norm
  regkit check specs/*.json
  regkit plan spec.json --model mypackage.models:make_model
  regkit schema -o regkit.schema.json
  regkit plugins --requirements
  regkit doctor
  regkit new regkit-mykind --constraint
  regkit conformance regkit-mykind
"""

_KINDS: Final = """Every kind that a document may name, from everything installed: its options (with = where one has a
default), what it means, and the distribution it comes from. Of one kind: its manual, with its options and their ranges,
an example that can be pasted into a document, and its source."""

_CHECK: Final = """Read documents and tell everything that is wrong with them, each with its line and column. Needs no
model. Exit status: 0 if all are valid, 1 if one is not."""

_PLAN: Final = """Bind a document to a model and print what would be optimized: a row for each weight or output that a
rule acts on, and how it is reached. Nothing is trained and nothing is changed. Kinds that the model's module registers
count."""

_SCHEMA: Final = """The JSON Schema of documents, with every installed kind in it. Save it beside your documents and
point their "$schema" at it: an editor then completes and checks them as you type."""

_PLUGINS: Final = """What is installed that offers kinds or adapters: its distribution, version and entry point, whether
it is loaded, blocked or broken, and where it is. Exit status: 1 if --broken finds any."""

_DOCTOR: Final = """Tell what an installation is made of and what is wrong with it: versions, the environment, plugins,
and their clashes. Exit status: 0 if nothing is wrong."""

_CONFORMANCE: Final = """Try every law of regkit.testing on the examples of each kind and adapter that a distribution
offers. Exit status: 0 if something was tried and every law holds."""

_NEW: Final = """Write the whole distribution of a plugin: its metadata with the entry point, one module, tests that try
every law, README, LICENSE and CI. It installs and passes its tests as it is; then put your own mathematics in."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, or 1 with the error on standard error."""
    options = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A pipe may have an encoding without Σ: an escape then stands for it.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with plugin_warnings(lambda sentence: print(f"regkit: warning: {sentence}", file=sys.stderr)):
            room = importlib.import_module(f"regkit.cli.{options.room}")
            status: int = getattr(room, options.command)(options)
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
    parser.add_argument("--version", action="version", version=f"regkit {regkit.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_documents(commands)
    _add_installation(commands)
    _add_plugin_authors(commands)
    return parser


def _add_documents(commands: _Commands) -> None:
    """Add the commands about documents and the kinds that documents may name."""
    kinds = _command(commands, "kinds", "kinds", "list every kind that is installed, or explain one", _KINDS)
    kinds.add_argument("kind", nargs="?", metavar="KIND", help="the whole manual of this kind")
    kinds.add_argument("--family", choices=FAMILIES, help="only this family")

    check = _command(commands, "check", "documents", "tell what is wrong with documents", _CHECK)
    check.add_argument("spec", nargs="+", metavar="SPEC", help="a JSON document")
    check.add_argument(
        "--strict", action="store_true", help="kinds must have the version that the document was saved with"
    )

    plan = _command(commands, "plan", "documents", "show what a document does to a model", _PLAN)
    plan.add_argument("spec", metavar="SPEC", help="a JSON document")
    plan.add_argument(
        "--model",
        required=True,
        metavar="MODULE:NAME",
        help="an nn.Module, or a function without arguments that returns one; found from the current folder",
    )

    schema = _command(commands, "schema", "documents", "print the JSON Schema of documents", _SCHEMA)
    schema.add_argument("-o", "--output", metavar="FILE", help="write it to a file")


def _add_installation(commands: _Commands) -> None:
    """Add the commands about an installation and its plugins."""
    plugins = _command(commands, "plugins", "plugins", "list what is installed", _PLUGINS)
    choices = plugins.add_mutually_exclusive_group()
    choices.add_argument("--json", action="store_true", help="everything that is known of them, as JSON")
    choices.add_argument("--requirements", action="store_true", help="the distributions in use, pinned for pip")
    choices.add_argument("--broken", action="store_true", help="only those that cannot be used, with their tracebacks")

    _command(commands, "doctor", "doctor", "tell what is wrong with an installation", _DOCTOR)


def _add_plugin_authors(commands: _Commands) -> None:
    """Add the commands for authors of plugins."""
    new = _command(commands, "new", "scaffold", "write the distribution of a plugin", _NEW)
    new.add_argument("name", metavar="NAME", help="the name of the distribution, such as regkit-nuclear")
    new.add_argument("--folder", metavar="DIR", help="where to write it; left out: a new folder of that name")
    new.set_defaults(template="penalty")
    templates = new.add_mutually_exclusive_group()
    for template, meaning in TEMPLATES.items():
        default = " (the default)" if template == "penalty" else ""
        templates.add_argument(
            f"--{template}", dest="template", action="store_const", const=template, help=meaning + default
        )

    summary = "try the laws on what a distribution offers"
    conformance = _command(commands, "conformance", "conformance", summary, _CONFORMANCE)
    name = "the name of the distribution, or of its entry point"
    conformance.add_argument("distribution", metavar="DISTRIBUTION", help=name)
    conformance.add_argument("--law", metavar="LAW", help="only this law")
    conformance.add_argument("--json", action="store_true", help="every result, as JSON")


def _command(commands: _Commands, name: str, room: str, summary: str, description: str) -> argparse.ArgumentParser:
    """Add a command: the function of this name in a room of this package."""
    parser = commands.add_parser(name, help=summary, description=description)
    parser.set_defaults(room=room, command=name)
    return parser
