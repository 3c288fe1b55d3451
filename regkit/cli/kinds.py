"""`regkit kinds`: the kinds that a document may name."""

from __future__ import annotations

import argparse
from typing import Any

from regkit import Registry
from regkit.cli.layout import WIDTH
from regkit.cli.manual import manual, word
from regkit.kinds import Kind
from regkit.plan.table import table
from regkit.registry.entries import Entry
from regkit.registry.names import FAMILIES, Family


def kinds(options: argparse.Namespace) -> int:
    """List every kind, or explain one."""
    registry = Registry()
    families: list[Family] = [options.family] if options.family else list(FAMILIES)
    if options.kind is not None:
        print(manual(_entry(options.kind, families, registry)))
        return 0
    groups = [(family, registry.entries(family)) for family in families]
    tables = [_table(family, entries) for family, entries in groups if entries]
    print("\n\n".join(tables) or "none is loaded; see `regkit plugins`")
    return 0


def _entry(name: str, families: list[Family], registry: Registry) -> Entry:
    cls: type[Kind] = registry.kind(name, *(families if len(families) == 1 else ()))  # which tells the nearest name
    return next(entry for entry in registry.entries() if entry.kind is cls)


def _table(family: Family, entries: list[Entry]) -> str:
    rows = [[entry.name, options_of(entry), entry.meaning, str(entry.origin)] for entry in entries]
    return table([family, "options", "meaning", "from"], rows, wrap=[1, 2], width=WIDTH)


def options_of(entry: Entry) -> str:
    """The options of a kind: first the required ones, then the others as `name=default`."""
    fields: dict[str, Any] = {name: field for name, field in entry.kind.model_fields.items() if name != "kind"}
    required = [name for name, field in fields.items() if field.is_required()]
    given = {name: field for name, field in fields.items() if not field.is_required()}
    defaults = [f"{name}={word(field.get_default(call_default_factory=True))}" for name, field in given.items()]
    return ", ".join([*required, *defaults])
