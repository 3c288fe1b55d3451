"""Where kinds and adapters are found: entry points of installed distributions, and plugins registered in-process."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

from torch import nn

from regkit import _pickled
from regkit.adapters import OUTPUT_ROLES, WEIGHT_ROLES, Adapter
from regkit.errors import PluginError, PluginWarning, unknown
from regkit.kinds import Kind
from regkit.registry.entries import Entry, Origin, canonical
from regkit.registry.names import FAMILIES, Family
from regkit.registry.plugin import (
    Known,
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
    same,
)
from regkit.registry.policy import Policy

T = TypeVar("T")

_CURE: Final = "uninstall one, or name the one to leave out in REGKIT_DISABLE_PLUGINS"


class Registry:
    """The kinds and adapters at hand: those of every entry point of group `regkit`, and what is registered.

    allow, block: names of installed distributions or of their entry points. With `allow`, of strangers' plugins only
    those are imported; what `block` holds is not, even regkit's own. The environment has a say, too: `policy`.

    A plugin that cannot be used is a PluginWarning, and an error where something asks for it. Raises PluginError for
    clashes: two distributions with one entry point, kind or module class.
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
        self._adapters: dict[Known, tuple[Adapter, Origin]] = {}
        if entry_points:
            self._discover(Policy.of(allow, block))
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
            self._take(offers)
        if problems:
            raise PluginError("\n".join(f"{problem}; {_CURE}" for problem in problems))
        for plugin in self.broken:
            if policy.strict:
                raise PluginError(f"{plugin.reason} (and REGKIT_STRICT_PLUGINS is 1)\n\n{plugin.report}")
            warnings.warn(f"{plugin.reason}; run `regkit plugins --broken`", PluginWarning, stacklevel=4)

    def register(self, plugin: T) -> T:
        """Add a plugin of this process, and return it: a module or an object with hook implementations, a kind's class
        or an adapter. So it decorates a class, in a notebook, say; when the cell is run again, the new class replaces
        the one of the same name and module.

        Raises PluginError, and adds nothing, where it offers something that is no kind or a name that exists.
        """
        place = place_of(plugin)
        offers = PluginOffers(Origin(place.partition(":")[0]))
        ask(plugin, offers)
        if problems := list(self._clashes(offers)):
            raise PluginError("\n".join(problems))
        kept = tuple(one for one in self._plugins if one.origin.installed or one.place != place)
        self._plugins = (*kept, record(place, offers))
        self._take(offers)
        return plugin

    @contextmanager
    def temporary(self, *plugins: object) -> Iterator[Registry]:
        """Register plugins for the length of a `with` block; afterwards the registry is as it was."""
        kept = self._plugins, dict(self._kinds), dict(self._adapters)
        try:
            for plugin in plugins:
                self.register(plugin)
            yield self
        finally:
            self._plugins, self._kinds, self._adapters = kept

    def _take(self, offers: PluginOffers) -> None:
        self._kinds.update((entry.name, entry) for entry in offers.kinds)
        for known, _ in offers.adapters:  # a class that was known by its name before, say, or the other way round
            self._adapters = {one: held for one, held in self._adapters.items() if not same(one, known)}
        self._adapters.update((known, (adapter, offers.origin)) for known, adapter in offers.adapters)

    def _clashes(self, offers: PluginOffers) -> Iterator[str]:
        """What of the offers is there already."""
        for entry in offers.kinds:
            other = self._kinds.get(entry.name)
            if other is not None and not entry.redefines(other):
                yield (
                    f"two plugins offer the kind {entry.name!r}: {_whose(other.origin, other.kind)} and "
                    f"{_whose(entry.origin, entry.kind)}"
                )
        for known, adapter in offers.adapters:
            for taken, (there, origin) in self._adapters.items():
                again = origin == offers.origin and not origin.installed and place_of(there) == place_of(adapter)
                if same(known, taken) and not again:
                    yield (
                        f"two plugins offer an adapter for {name_of(known)}: {_whose(origin, there)} and "
                        f"{_whose(offers.origin, adapter)}"
                    )

    @property
    def plugins(self) -> tuple[Plugin, ...]:
        """What became of each plugin: loaded, blocked or broken."""
        return self._plugins

    @property
    def broken(self) -> tuple[Plugin, ...]:
        """The plugins that cannot be used."""
        return tuple(plugin for plugin in self._plugins if plugin.state == "broken")

    def entries(self, *families: Family) -> list[Entry]:
        """Every kind of these families (none given: of all), by family, then by name."""
        found = sorted(self._kinds.values(), key=lambda entry: entry.name)
        return [entry for family in (families or FAMILIES) for entry in found if entry.family == family]

    def find(self, name: str, *families: Family) -> Entry | None:
        """The kind of this name in any of these families (none given: in all)."""
        entry = self._kinds.get(name)
        return entry if entry is not None and (not families or entry.family in families) else None

    def kind(self, name: str, *families: Family) -> type[Kind]:
        """The class of this name. Raises PluginError that names the nearest one where there is none."""
        entry = self.find(name, *families)
        if entry is None:
            what = " or ".join(families) or "kind"
            sentence = unknown(what, name, [e.name for e in self.entries(*families)])
            raise PluginError(sentence + self.absence(name))
        return entry.kind

    def absence(self, name: str, distribution: str | None = None, version: str | None = None) -> str:
        """Why a kind that does not exist may be missing: a sentence to append, or none.

        distribution, version: where it once came from, if that is known.
        """
        idle = [plugin for plugin in self._plugins if plugin.state != "loaded"]
        if distribution is not None:
            saved = f". The document was saved with it from {Origin(distribution, version)}"
            mine = [p for p in self._plugins if canonical(p.origin.distribution) == canonical(distribution)]
            unusable = [plugin for plugin in idle if plugin in mine]
            if unusable:
                return f"{saved}; here is {'; '.join(map(str, unusable))}"
            here = f"; {mine[0].origin} is installed, which has it not" if mine else ""
            return f"{saved}{here}" + (f"; try: pip install {distribution}=={version}" if version else "")
        if offering := [plugin for plugin in idle if name in plugin.kinds]:
            return f". It is of {'; '.join(map(str, offering))}"
        return self.idle("have it")

    def idle(self, verb: str) -> str:
        """A sentence to append that names the plugins that are not loaded and may do something, or none."""
        found = [str(plugin) for plugin in self._plugins if plugin.state != "loaded"]
        return f". Not loaded, and may {verb}: {'; '.join(found)}" if found else ""

    def adapter(self, module: nn.Module) -> Adapter | None:
        """The adapter of the module's class, or of its nearest ancestor that has one."""
        found = self._find_adapter(module)
        return None if found is None else found[0]

    def adapter_origin(self, module: nn.Module) -> Origin | None:
        """Where that adapter comes from."""
        found = self._find_adapter(module)
        return None if found is None else found[1]

    def _find_adapter(self, module: nn.Module) -> tuple[Adapter, Origin] | None:
        for ancestor in type(module).__mro__:
            for known in (ancestor, f"{ancestor.__module__}:{ancestor.__qualname__}"):
                if known in self._adapters:
                    return self._adapters[known]
        return None

    @property
    def adapters(self) -> list[Adapter]:
        """Every adapter, each once."""
        return list({id(adapter): adapter for adapter, _ in self._adapters.values()}.values())

    @property
    def module_classes(self) -> list[str]:
        """The classes that adapters know, by name."""
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
        return self  # what is installed is one for all that is copied

    def __reduce__(self) -> _pickled.Call:
        return _pickled.reduce_registry(self)


def _whose(origin: Origin, offer: object) -> str:
    """Where an offer comes from, to tell it from another of its name: `nuclear 1.0 (its entry point, its class)`."""
    return f"{origin} ({', '.join(filter(None, (origin.point, place_of(offer))))})"


def _refuse_to_wait_for_oneself() -> None:
    if being_asked():
        raise PluginError(
            "regkit's kinds were needed while plugins are loaded: leave @regkit.register off what an entry point "
            "offers, and read documents inside functions"
        )


_default: Registry | None = None
_making: Final = threading.Lock()


def default() -> Registry:
    """The registry of everything installed, made when it is first needed.

    Raises PluginError where a plugin needs it while it is itself asked what it offers: it would wait for itself.
    """
    global _default
    _refuse_to_wait_for_oneself()
    with _making:
        if _default is None:
            _default = Registry()
        return _default


def register(plugin: T) -> T:
    """Add a plugin of this process to the default registry, and return it: `@regkit.register` above a class will do.

    Raises PluginError as `Registry.register`.
    """
    return default().register(plugin)
