"""Where kinds and adapters are found: entry points of installed distributions, and plugins registered in-process."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any, Final, Literal

import pluggy
from torch import nn

from regkit import hookspecs
from regkit.errors import PluginError, unknown
from regkit.kinds import ActivityPenalty, Constraint, Kind, Penalty, Schedule
from regkit.sites import OUTPUT_ROLES, WEIGHT_ROLES, Adapter

Family = Literal["penalty", "activity penalty", "constraint", "schedule"]

CONTRACTS: Final[Mapping[Family, type[Kind]]] = {
    "penalty": Penalty,
    "activity penalty": ActivityPenalty,
    "constraint": Constraint,
    "schedule": Schedule,
}
"""The class that every kind of a family is made from."""
_HOOKS: Final[Mapping[str, Family]] = {
    "regkit_penalties": "penalty",
    "regkit_activity_penalties": "activity penalty",
    "regkit_constraints": "constraint",
    "regkit_schedules": "schedule",
}
_NAME: Final = re.compile(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)*")
_LONGEST_NAME: Final = 100


@dataclass(frozen=True)
class Origin:
    """Where a plugin comes from. One registered in-process has its module for a distribution and no version."""

    distribution: str
    version: str | None = None

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}" if self.version else self.distribution


@dataclass(frozen=True)
class Entry:
    """A kind in the registry."""

    family: Family
    name: str
    kind: type[Kind]
    origin: Origin

    @property
    def meaning(self) -> str:
        """The first line of the class' docstring."""
        return (self.kind.__doc__ or "").strip().partition("\n")[0]


class Registry:
    """The kinds and adapters at hand, by family and name: those of every entry point of group `regkit`, and more."""

    def __init__(self, plugins: Iterable[object] = (), *, entry_points: bool = True) -> None:
        self._manager = pluggy.PluginManager(hookspecs.GROUP)
        self._manager.add_hookspecs(hookspecs)
        self._kinds: dict[Family, dict[str, Entry]] = {family: {} for family in CONTRACTS}
        self._adapters: dict[type[nn.Module], tuple[Adapter, Origin]] = {}
        for point in metadata.entry_points(group=hookspecs.GROUP) if entry_points else ():
            origin = Origin(point.dist.name, point.dist.version) if point.dist else Origin(point.value)
            self._add(_load(point, origin), origin)
        for plugin in plugins:
            self.register(plugin)

    def register(self, plugin: object) -> None:
        """Add a plugin of this process: a module, or any object with hook implementations.

        Raises PluginError, and adds nothing, where it offers something that is no kind or a name that exists.
        """
        module = getattr(plugin, "__module__", None) or getattr(plugin, "__name__", type(plugin).__module__)
        self._add(plugin, Origin(str(module)))

    def _add(self, plugin: object, origin: Origin) -> None:
        if self._manager.is_registered(plugin):
            raise PluginError(f"plugin {origin} is registered already")
        # Strangers' plugins may be called alike: each has a name of its own here.
        name = f"{origin} #{len(self._manager.get_plugins())}"
        try:
            self._manager.register(plugin, name)
            self._manager.check_pending()
        except pluggy.PluginValidationError as error:
            if self._manager.is_registered(plugin):
                self._manager.unregister(plugin)
            raise PluginError(f"plugin {origin}: {error}") from error
        if not self._manager.get_hookcallers(plugin):
            self._manager.unregister(plugin)
            raise PluginError(
                f"plugin {origin} implements no hook; hooks are: {', '.join([*_HOOKS, 'regkit_adapters'])}"
            )
        try:
            entries, adapters = self._offers(name, origin)
        except PluginError:
            self._manager.unregister(plugin)
            raise
        for entry in entries:
            self._kinds[entry.family][entry.name] = entry
        self._adapters.update(adapters)

    def _offers(
        self, plugin_name: str, origin: Origin
    ) -> tuple[list[Entry], dict[type[nn.Module], tuple[Adapter, Origin]]]:
        entries: list[Entry] = []
        for hook, family in _HOOKS.items():
            for offer in self._call(hook, plugin_name, origin):
                entry = _entry(offer, family, origin)
                self._refuse_clash(entry, entries)
                entries.append(entry)
        adapters: dict[type[nn.Module], tuple[Adapter, Origin]] = {}
        for adapter in self._call("regkit_adapters", plugin_name, origin):
            if not isinstance(adapter, Adapter):
                raise PluginError(f"plugin {origin}: regkit_adapters offers {adapter!r}, which is not an Adapter")
            for module_class in _classes(adapter, origin):
                other = self._adapters.get(module_class) or adapters.get(module_class)
                if other is not None:
                    raise PluginError(
                        f"two plugins offer an adapter for {module_class.__name__}: {other[1]} and {origin}"
                    )
                adapters[module_class] = (adapter, origin)
        return entries, adapters

    def _call(self, hook: str, plugin_name: str, origin: Origin) -> Iterator[Any]:
        for impl in getattr(self._manager.hook, hook).get_hookimpls():
            if impl.plugin_name != plugin_name:
                continue
            try:
                yield from impl.function()
            except Exception as error:  # whatever a stranger's code raises, its user must learn whose it was
                raise PluginError(f"plugin {origin}: {hook} failed: {error!r}") from error

    def _refuse_clash(self, entry: Entry, siblings: Iterable[Entry]) -> None:
        taken = [*siblings, *(table[entry.name] for table in self._kinds.values() if entry.name in table)]
        for other in taken:
            if other.name == entry.name and other.origin == entry.origin:
                raise PluginError(f"plugin {entry.origin} offers the kind {entry.name!r} twice")
            if other.name == entry.name:
                raise PluginError(
                    f"two plugins offer the kind {entry.name!r}: {other.origin} ({other.kind.__module__}) and "
                    f"{entry.origin} ({entry.kind.__module__}); uninstall one, or rename its kind"
                )

    def entries(self, *families: Family) -> list[Entry]:
        """Every kind of these families (none given: of all), by family, then by name."""
        tables = [self._kinds[family] for family in (families or CONTRACTS)]
        return [table[name] for table in tables for name in sorted(table)]

    def find(self, name: str, *families: Family) -> Entry | None:
        """The kind of this name in any of these families (none given: in all)."""
        return next((self._kinds[f][name] for f in (families or CONTRACTS) if name in self._kinds[f]), None)

    def kind(self, name: str, *families: Family) -> type[Kind]:
        """The class of this name. Raises PluginError that names the nearest one where there is none."""
        entry = self.find(name, *families)
        if entry is None:
            what = " or ".join(families) or "kind"
            raise PluginError(unknown(what, name, [e.name for e in self.entries(*families)]))
        return entry.kind

    def adapter(self, module: nn.Module) -> Adapter | None:
        """The adapter of the module's class, or of its nearest ancestor that has one."""
        found = (self._adapters.get(ancestor) for ancestor in type(module).__mro__)
        return next((pair[0] for pair in found if pair is not None), None)

    @property
    def module_classes(self) -> list[str]:
        """The classes that adapters know, by name."""
        return sorted(cls.__name__ for cls in self._adapters)

    @property
    def roles(self) -> list[str]:
        """Every role that a target may name."""
        return list(
            dict.fromkeys([*WEIGHT_ROLES, *OUTPUT_ROLES, *(r for a, _ in self._adapters.values() for r in a.roles)])
        )

    @property
    def gates(self) -> list[str]:
        """Every gate that a target may name."""
        return list(dict.fromkeys(gate for adapter, _ in self._adapters.values() for gate in adapter.gates))


def _classes(adapter: Adapter, origin: Origin) -> tuple[type[nn.Module], ...]:
    classes: Any = getattr(adapter, "modules", None)
    if not isinstance(classes, tuple) or not classes or not all(isinstance(cls, type) for cls in classes):
        name = type(adapter).__name__
        raise PluginError(f"plugin {origin}: {name}.modules must be a tuple of nn.Module classes, got {classes!r}")
    return classes


def _load(point: metadata.EntryPoint, origin: Origin) -> object:
    try:
        return point.load()
    except Exception as error:  # an import runs a stranger's code: anything can come out
        raise PluginError(f"plugin {point.name!r} of {origin} does not import: {error!r}") from error


def _entry(offer: object, family: Family, origin: Origin) -> Entry:
    contract = CONTRACTS[family]
    if not (isinstance(offer, type) and issubclass(offer, contract)):
        raise PluginError(f"plugin {origin}: {offer!r} is not a {family}: it must be a subclass of {contract.__name__}")
    if missing := sorted(offer.__abstractmethods__):
        raise PluginError(f"plugin {origin}: {offer.__qualname__} lacks {', '.join(missing)}")
    name = offer.kind_name()
    if not _NAME.fullmatch(name) or len(name) > _LONGEST_NAME:
        raise PluginError(f"plugin {origin}: a kind is named in lower_case, with dots at most, not {name!r}")
    return Entry(family, name, offer, origin)


@cache
def default() -> Registry:
    """The registry of everything installed, made when it is first needed."""
    return Registry()
