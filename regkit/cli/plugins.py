"""`regkit plugins`: the installed plugins."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, Final

from regkit import Registry
from regkit.cli.layout import WIDTH, as_json, few, fill
from regkit.cli.plugin_warnings import plugin_warnings
from regkit.errors import printable
from regkit.plan.table import table
from regkit.registry.entries import Entry, canonical
from regkit.registry.plugin import Plugin

_HEADER: Final = ("distribution", "version", "entry point", "state", "offers", "place")


def plugins(options: argparse.Namespace) -> int:
    """Print the installed plugins, as a table, as JSON, as requirements, or the broken ones alone."""
    sentences: list[str] = []
    with plugin_warnings(sentences.append):
        registry = Registry()
    if options.json:
        print(as_json([_as_json_object(plugin, registry) for plugin in registry.plugins]))
    elif options.requirements:
        print("".join(f"{printable(pin)}\n" for pin in requirements(registry.plugins)), end="")
    elif options.broken:
        print("\n".join(map(_traceback, registry.broken)) or "no plugin is broken")
    else:
        idle = [plugin for plugin in registry.plugins if plugin.state != "loaded"]
        print(overview(registry.plugins), *(fill(why(plugin), hang="  ") for plugin in idle), sep="\n")
    for sentence in sentences:
        if not any(plugin.reason in sentence for plugin in registry.broken):  # those have been shown
            print(f"regkit: warning: {sentence}", file=sys.stderr)
    return 1 if options.broken and registry.broken else 0


def overview(plugins: Sequence[Plugin]) -> str:
    """A table of plugins."""
    rows = [
        [
            plugin.origin.distribution,
            plugin.origin.version or "",
            plugin.origin.point or "",
            plugin.state,
            few([*plugin.kinds, *plugin.adapters]),
            plugin.place,
        ]
        for plugin in plugins
    ]
    return table(_HEADER, rows, wrap=[4], width=WIDTH)


def why(plugin: Plugin) -> str:
    """The origin of a plugin, and why the plugin is not loaded."""
    if plugin.state == "broken":
        return plugin.reason  # which says whose it is
    return f"{plugin.origin} ({plugin.origin.point}) is {plugin.state}: {plugin.reason}"


def _traceback(plugin: Plugin) -> str:
    report = (f"  {printable(line)}".rstrip() for line in plugin.report.splitlines())
    return "\n".join([printable(why(plugin)), "", *report])


def requirements(plugins: Sequence[Plugin]) -> list[str]:
    """A pin for each distribution of which something is loaded."""
    origins = [plugin.origin for plugin in plugins if plugin.state == "loaded" and plugin.origin.version]
    pins = {canonical(origin.distribution): f"{origin.distribution}=={origin.version}" for origin in origins}
    return [pins[name] for name in sorted(pins)]


def _as_json_object(plugin: Plugin, registry: Registry) -> dict[str, Any]:
    entries = {entry.name: entry for entry in registry.entries() if entry.origin == plugin.origin}
    return {
        "distribution": plugin.origin.distribution,
        "version": plugin.origin.version,
        "entry_point": plugin.origin.point,
        "place": plugin.place,
        "state": plugin.state,
        "reason": plugin.reason,
        "traceback": plugin.report,
        "kinds": [_kind(name, entries.get(name)) for name in plugin.kinds],
        "adapters": list(plugin.adapters),
    }


def _kind(name: str, entry: Entry | None) -> dict[str, Any]:
    """A kind as JSON; of a kind that a broken plugin had offered, the name alone."""
    return {
        "name": name,
        "family": entry and entry.family,
        "class": entry and f"{entry.kind.__module__}:{entry.kind.__qualname__}",
        "meaning": entry and entry.meaning,
        "file": entry and entry.file,
        "line": entry and entry.line,
    }
