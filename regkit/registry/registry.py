"""The registry of kinds and adapters, from installed distributions and from plugins registered in-process."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

from torch import nn

from regkit import _pickled
from regkit.adapters import OUTPUT_ROLES, WEIGHT_ROLES, Adapter
from regkit.errors import PluginError, PluginWarning, quoted, unknown
from regkit.kinds import Kind
from regkit.registry.entries import Entry, Origin, canonical, full_name, installable
from regkit.registry.names import FAMILIES, Family
from regkit.registry.plugin import (
    ModuleClass,
    Plugin,
    PluginOffers,
    ask,
    being_asked,
    clashes,
    installed,
    loaded,
    name_of,
    place_of,
    record,
    same_class,
)
from regkit.registry.policy import Policy

T = TypeVar("T")

_CURE: Final = "uninstall one, or name the one to leave out in REGKIT_DISABLE_PLUGINS"


class Registry:
    """The kinds and adapters at hand: of every entry point of group `regkit`, and of plugins that are registered.

    plugins: plugins of this process to register.
    entry_points: whether installed plugins are looked for.
    allow: names of distributions or of entry points. Of plugins that are not regkit's own, only these are imported.
    block: names of distributions or of entry points, which are not imported, even if they are regkit's own.

    The environment has a say, too: REGKIT_PLUGINS, REGKIT_DISABLE_PLUGINS and REGKIT_STRICT_PLUGINS.

    A plugin that cannot be used is a PluginWarning, and an error where something asks for it. Raises PluginError for
    clashes: two distributions with one entry point, kind or module class.

    >>> registry = regkit.Registry(allow=[])  # regkit's own plugins alone
    >>> registry.kind("l2")(strength=1e-4).describe()
    'l2(strength=0.0001)'
    >>> "GRU" in registry.module_classes
    True
    """

    def __init__(
        self,
        plugins: Iterable[object] = (),
        *,
        entry_points: bool = True,
        allow: Iterable[str] | None = None,
        block: Iterable[str] = (),
    ) -> None:
        self._plugins: tuple[Plugin, ...] = ()
        self._kinds: dict[str, Entry] = {}
        self._adapters: dict[ModuleClass, tuple[Adapter, Origin]] = {}
        if entry_points:
            self._discover(Policy.from_environment(allow, block))
        elif allow is not None or block:
            raise PluginError("allow and block choose among entry points, and entry_points is False")
        for plugin in plugins:
            self.register(plugin)

    def _discover(self, policy: Policy) -> None:
        _refuse_to_wait_for_oneself()
        everything = installed()
        policy.verify_names(origin for _, origin in everything)
        verdicts = {origin: policy.verdict(origin) for _, origin in everything}
        allowed = [(point, origin) for point, origin in everything if verdicts[origin] is None]
        problems = list(clashes(allowed))
        for point, origin in everything:
            if (verdict := verdicts[origin]) is not None:
                self._plugins += (Plugin(origin, point.value, "blocked", verdict),)
                continue
            plugin, offers = loaded(point, origin)
            self._plugins += (plugin,)
            problems += self._clashes(offers)
            self._add(offers)
        if problems:
            raise PluginError(*(f"{problem}; {_CURE}" for problem in problems))
        for plugin in self.broken:
            if policy.strict:
                raise PluginError(f"{plugin.reason} (and REGKIT_STRICT_PLUGINS is 1)", "", *plugin.report.splitlines())
            warnings.warn(f"{plugin.reason}; run `regkit plugins --broken`", PluginWarning, stacklevel=4)

    def register(self, plugin: T) -> T:
        """Add a plugin of this process, and return the plugin.

        plugin: a module or an object with hook implementations, a kind's class, or an adapter.

        Returning the plugin makes this a decorator of classes, in a notebook, say; when the cell is run again, the new
        class replaces the one of the same name and module.

        Raises PluginError, and adds nothing, where the plugin offers something that is no kind or a name that exists.
        """
        place = place_of(plugin)
        offers = PluginOffers(Origin(place.partition(":")[0]))
        ask(plugin, offers)
        if problems := list(self._clashes(offers)):
            raise PluginError(*problems)
        kept = tuple(one for one in self._plugins if one.origin.installed or one.place != place)
        self._plugins = (*kept, record(place, offers))
        self._add(offers)
        return plugin

    @contextmanager
    def temporary(self, *plugins: object) -> Iterator[Registry]:
        """Register plugins for the length of a `with` block; afterwards the registry is as before."""
        kept = self._plugins, dict(self._kinds), dict(self._adapters)
        try:
            for plugin in plugins:
                self.register(plugin)
            yield self
        finally:
            self._plugins, self._kinds, self._adapters = kept

    def _add(self, offers: PluginOffers) -> None:
        self._kinds.update((entry.name, entry) for entry in offers.kinds)
        for known, adapter in offers.adapters:
            # A class takes the place of its name, and the name that of the class.
            kept = {one: entry for one, entry in self._adapters.items() if not same_class(one, known)}
            self._adapters = {**kept, known: (adapter, offers.origin)}

    def _clashes(self, offers: PluginOffers) -> Iterator[str]:
        """A sentence for each offer that another plugin makes already."""
        for entry in offers.kinds:
            earlier = self._kinds.get(entry.name)
            if earlier is not None and not entry.redefines(earlier):
                yield (
                    f"two plugins offer the kind {entry.name!r}: {_source(earlier.origin, earlier.kind)} and "
                    f"{_source(entry.origin, entry.kind)}"
                )
        for known, adapter in offers.adapters:
            for other_class, (other, origin) in self._adapters.items():
                again = origin == offers.origin and not origin.installed and place_of(other) == place_of(adapter)
                if same_class(known, other_class) and not again:
                    yield (
                        f"two plugins offer an adapter for {name_of(known)}: {_source(origin, other)} and "
                        f"{_source(offers.origin, adapter)}"
                    )

    @property
    def plugins(self) -> tuple[Plugin, ...]:
        """The record of each plugin: loaded, blocked or broken."""
        return self._plugins

    @property
    def broken(self) -> tuple[Plugin, ...]:
        """The plugins that cannot be used."""
        return tuple(plugin for plugin in self._plugins if plugin.state == "broken")

    def entries(self, *families: Family) -> list[Entry]:
        """The entry of every kind of the families (none given: of all families), by family, then by name."""
        found = sorted(self._kinds.values(), key=lambda entry: entry.name)
        return [entry for family in (families or FAMILIES) for entry in found if entry.family == family]

    def find(self, name: str, *families: Family) -> Entry | None:
        """The entry of the kind of this name in any of the families (none given: in all), or None."""
        entry = self._kinds.get(name)
        return entry if entry is not None and (not families or entry.family in families) else None

    def kind(self, name: str, *families: Family) -> type[Kind]:
        """The class of the kind of this name. Raises PluginError, with the nearest name, where there is none."""
        entry = self.find(name, *families)
        if entry is None:
            sentence = unknown(" or ".join(families) or "kind", name, [e.name for e in self.entries(*families)])
            raise PluginError(sentence + self.absence(name))
        return entry.kind

    def absence(self, name: str, distribution: str | None = None, version: str | None = None) -> str:
        """A sentence to append that says why a kind may be missing; empty where nothing is known.

        distribution, version: the source that the kind once had, if that is known.
        """
        idle = [plugin for plugin in self._plugins if plugin.state != "loaded"]
        if distribution is not None:
            if not installable(distribution, version):
                claim = quoted(" ".join(filter(None, (distribution, version))))
                return f". The document claims that it was saved with it from {claim}, which is no distribution"
            saved = f". The document says that it was saved with it from {Origin(distribution, version)}"
            same = [p for p in self._plugins if canonical(p.origin.distribution) == canonical(distribution)]
            unusable = [plugin for plugin in same if plugin in idle]
            if unusable:
                return f"{saved}; here is {'; '.join(map(str, unusable))}"
            here = f"; {same[0].origin} is installed, which has it not" if same else ""
            return f"{saved}{here}" + (f"; try: pip install {distribution}=={version}" if version else "")
        if offering := [plugin for plugin in idle if name in plugin.kinds]:
            return f". It is of {'; '.join(map(str, offering))}"
        return self.idle("have it")

    def idle(self, verb: str) -> str:
        """A sentence to append that names the plugins that are not loaded and may do something; empty without any."""
        found = [str(plugin) for plugin in self._plugins if plugin.state != "loaded"]
        return f". Not loaded, and may {verb}: {'; '.join(found)}" if found else ""

    def adapter(self, module: nn.Module) -> Adapter | None:
        """The adapter of the module's class, or of the nearest ancestor that has an adapter, or None."""
        return self._adapter_entry(module)[0]

    def adapter_origin(self, module: nn.Module) -> Origin | None:
        """The origin of the adapter of the module's class, or None where there is no adapter."""
        return self._adapter_entry(module)[1]

    def _adapter_entry(self, module: nn.Module) -> tuple[Adapter, Origin] | tuple[None, None]:
        for ancestor in type(module).__mro__:
            for known in (ancestor, full_name(ancestor)):
                if known in self._adapters:
                    return self._adapters[known]
        return None, None

    @property
    def adapters(self) -> list[Adapter]:
        """Every adapter, each once."""
        return list({id(adapter): adapter for adapter, _ in self._adapters.values()}.values())

    @property
    def module_classes(self) -> list[str]:
        """The names of the classes that adapters know."""
        return sorted(map(name_of, self._adapters))

    @property
    def roles(self) -> list[str]:
        """Every role that a target may name."""
        return list(dict.fromkeys([*WEIGHT_ROLES, *OUTPUT_ROLES, *(r for a in self.adapters for r in a.roles)]))

    @property
    def gates(self) -> list[str]:
        """Every gate that a target may name."""
        return list(dict.fromkeys(gate for adapter in self.adapters for gate in adapter.gates))

    def __deepcopy__(self, memo: object) -> Registry:
        return self  # copies of a model share it

    def __reduce__(self) -> _pickled.Call:
        return _pickled.reduce_registry(self)


def _source(origin: Origin, offer: object) -> str:
    """The origin of an offer, told apart from others of its name: `nuclear 1.0 (its entry point, its class)`."""
    return f"{origin} ({', '.join(filter(None, (origin.point, place_of(offer))))})"


def _refuse_to_wait_for_oneself() -> None:
    if being_asked():
        raise PluginError(
            "regkit's kinds were needed while plugins are loaded: leave @regkit.register off what an entry point "
            "offers, and read documents inside functions"
        )


_default: Registry | None = None
_default_lock: Final = threading.Lock()


def default() -> Registry:
    """The registry of everything installed, made at the first call.

    Raises PluginError where a plugin calls this while it is loaded: the registry would wait for itself.
    """
    global _default
    _refuse_to_wait_for_oneself()
    with _default_lock:
        if _default is None:
            _default = Registry()
        return _default


def register(plugin: T) -> T:
    """Add a plugin of this process to the default registry, and return the plugin, as a decorator of a class does.

    Raises PluginError as `Registry.register`.
    """
    return default().register(plugin)
