"""One plugin on its own: an entry point or an object is loaded and asked for its offers, or found to be broken."""

from __future__ import annotations

import re
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from types import ModuleType
from typing import Any, Final, Literal

import pluggy
from torch import nn

from regkit.adapters import GATE_ALIASES, Adapter
from regkit.errors import PluginError, listing, unknown
from regkit.kinds import Kind
from regkit.registry import hookspecs
from regkit.registry.entries import CONTRACTS, Entry, Origin, canonical, entry_of, full_name
from regkit.registry.names import Family

HOOKS: Final[dict[str, Family]] = {
    "regkit_penalties": "penalty",
    "regkit_activity_penalties": "activity penalty",
    "regkit_constraints": "constraint",
    "regkit_schedules": "schedule",
}
"""The hooks that offer kinds, each with its family. Adapters have the hook `regkit_adapters`."""

ModuleClass = type[nn.Module] | str
"""A class of modules, or its name `package.module:Class`, for which nothing need be imported."""

_CLASS_NAME: Final = re.compile(r"[A-Za-z_]\w*(\.\w+)*:[A-Za-z_]\w*(\.\w+)*")


@dataclass
class PluginOffers:
    """The kinds and adapters that a plugin offers."""

    origin: Origin
    kinds: list[Entry] = field(default_factory=list)
    adapters: list[tuple[ModuleClass, Adapter]] = field(default_factory=list)


@dataclass(frozen=True)
class Plugin:
    """The record of a plugin that was found: loaded, blocked or broken.

    place: the module or object that the plugin is, as `package.module` or `package.module:object`.
    reason: why the plugin is blocked or broken, else empty. report: the traceback of a broken plugin.
    kinds, adapters: the names of kinds and of module classes that the plugin offers, as far as they are known.
    """

    origin: Origin
    place: str
    state: Literal["loaded", "blocked", "broken"]
    reason: str = ""
    report: str = ""
    kinds: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()

    def __str__(self) -> str:
        point = f" ({self.origin.point})" if self.origin.point else ""
        return f"{self.origin}{point}" + (f", which is {self.state}: {self.reason}" if self.reason else "")


def installed() -> list[tuple[metadata.EntryPoint, Origin]]:
    """Every entry point of group `regkit` with its origin, sorted by distribution and name.

    An entry point that an installer has left behind twice (`~egkit-0.1.dist-info`) is given once.
    """
    once: dict[tuple[str, str, str], tuple[metadata.EntryPoint, Origin]] = {}
    for point in metadata.entry_points(group=hookspecs.GROUP):
        origin = _origin(point)
        once.setdefault((canonical(origin.distribution), point.name, point.value), (point, origin))
    return sorted(once.values(), key=lambda pair: (pair[1].distribution.lower(), pair[0].name))


def _origin(point: metadata.EntryPoint) -> Origin:
    # An entry point made by hand, as in a frozen program, has no distribution; one half uninstalled has no name.
    # The name is asked of the metadata: `dist.name` of a nameless one is to raise KeyError in a Python to come.
    if point.dist is None or "Name" not in point.dist.metadata:
        return Origin(point.value.partition(":")[0], None, point.name)
    return Origin(point.dist.name, point.dist.version, point.name)


def loaded(point: metadata.EntryPoint, origin: Origin) -> tuple[Plugin, PluginOffers]:
    """Import a plugin and ask for its offers. Returns its record, and no offers where the plugin is broken.

    An error of the plugin is not raised: its sentence and traceback are in the record.
    """
    offers = PluginOffers(origin)
    try:
        with _plugin_code():
            ask(_imported(point, origin), offers)
    except PluginError as error:
        report = "".join(traceback.format_exception(error))
        return record(point.value, offers, reason=str(error), report=report), PluginOffers(origin)
    return record(point.value, offers), offers


def _imported(point: metadata.EntryPoint, origin: Origin) -> Any:
    try:
        plugin = point.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # an import runs the plugin author's code, which may raise anything
        raise PluginError(f"plugin {point.name!r} of {origin} does not import: {_shown(error)}") from error
    if getattr(getattr(sys.modules.get(point.module), "__spec__", None), "_initializing", False):
        raise PluginError(
            f"plugin {point.name!r} of {origin} is half imported: {point.module} needs regkit's kinds while it is "
            "imported, and regkit needs what it offers; read documents and register kinds inside functions"
        )
    return plugin


_asking: Final = threading.local()


@contextmanager
def _plugin_code() -> Iterator[None]:
    before, _asking.now = being_asked(), True
    try:
        yield
    finally:
        _asking.now = before


def being_asked() -> bool:
    """Whether this thread runs code of an installed plugin now, to import the plugin or to ask for its offers."""
    return getattr(_asking, "now", False)


def _shown(error: BaseException) -> str:
    try:
        return repr(error)
    except Exception:  # its own repr fails, too
        return type(error).__name__


def record(place: str, offers: PluginOffers, *, reason: str = "", report: str = "") -> Plugin:
    """The record of a plugin that was loaded or, where a reason is given, is broken."""
    kinds = tuple(entry.name for entry in offers.kinds)
    adapters = tuple(name_of(known) for known, _ in offers.adapters)
    return Plugin(offers.origin, place, "broken" if reason else "loaded", reason, report, kinds, adapters)


def place_of(plugin: object) -> str:
    """The name of a module that is a plugin of this process; of another plugin, the full name of its class."""
    if isinstance(plugin, ModuleType):
        return plugin.__name__
    return full_name(plugin if isinstance(plugin, type) else type(plugin))


def same_class(one: ModuleClass, other: ModuleClass) -> bool:
    """Whether one class of modules is meant: by itself or by its name. Two classes may well have one name."""
    return one == other or (isinstance(one, str) != isinstance(other, str) and full_name(one) == full_name(other))


def name_of(known: ModuleClass) -> str:
    """The name of a class of modules without its package and module."""
    return known.rpartition(":")[2] if isinstance(known, str) else known.__name__


def ask(plugin: object, offers: PluginOffers, specs: ModuleType = hookspecs) -> None:
    """Put the offers of a plugin into `offers`. The plugin is an object with hooks, or a kind or an adapter itself.

    Raises PluginError for an offer that cannot be used; `offers` then holds the offers before that one.
    """
    try:
        _ask(plugin, offers, specs)
    except (PluginError, KeyboardInterrupt):
        raise
    except BaseException as error:  # even `isinstance` runs the author's code where a metaclass has its own
        raise PluginError(f"plugin {offers.origin}: {_shown(error)}") from error
    names = [entry.name for entry in offers.kinds]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise PluginError(f"plugin {offers.origin} offers the kind {twice[0]!r} twice")
    for index, (known, _) in enumerate(offers.adapters):
        if any(same_class(known, other) for other, _ in offers.adapters[:index]):
            raise PluginError(f"plugin {offers.origin} offers an adapter for {name_of(known)} twice")


def _ask(plugin: object, offers: PluginOffers, specs: ModuleType) -> None:
    origin = offers.origin
    if isinstance(plugin, type) and issubclass(plugin, Kind):
        fitting: list[Family] = [name for name, contract in CONTRACTS.items() if issubclass(plugin, contract)]
        offers.kinds.append(entry_of(plugin, fitting[0] if fitting else "penalty", origin))
    elif isinstance(plugin, Adapter) or (isinstance(plugin, type) and issubclass(plugin, Adapter)):
        offers.adapters.extend(_module_classes(_instance(plugin, origin), origin))
    else:
        _ask_hooks(plugin, offers, specs)


def _instance(plugin: Adapter | type[Adapter], origin: Origin) -> Adapter:
    if isinstance(plugin, Adapter):
        return plugin
    try:
        return plugin()
    except Exception as error:  # the class is abstract, or has an __init__ of its author's
        raise PluginError(f"plugin {origin}: {plugin.__qualname__}() failed: {error}") from error


def _ask_hooks(plugin: object, offers: PluginOffers, specs: ModuleType) -> None:
    origin = offers.origin
    # Each plugin has a manager of its own: pluggy handles its wrappers, optional arguments and deprecations there.
    manager = pluggy.PluginManager(hookspecs.GROUP)
    manager.add_hookspecs(specs)
    try:
        manager.register(plugin, str(origin))
    except Exception as error:  # pluggy reads every attribute, and a property may raise anything
        raise PluginError(f"plugin {origin}: {error}") from error
    hooks, callers = [*HOOKS, "regkit_adapters"], manager.get_hookcallers(plugin)
    if not callers:
        raise PluginError(f"plugin {origin} implements no hook; hooks are: {listing(hooks)}")
    for caller in callers:
        if not caller.has_spec() and not all(one.optionalhook for one in caller.get_hookimpls()):
            raise PluginError(f"plugin {origin}: {unknown('hook', caller.name, hooks)}")
    for hook, family in HOOKS.items():
        for offer in _call_hook(manager, hook, origin):
            offers.kinds.append(entry_of(offer, family, origin))
    for adapter in _call_hook(manager, "regkit_adapters", origin):
        if not isinstance(adapter, Adapter):
            raise PluginError(f"plugin {origin}: regkit_adapters offers {adapter!r}, which is not an Adapter")
        offers.adapters.extend(_module_classes(adapter, origin))


def _call_hook(manager: pluggy.PluginManager, hook: str, origin: Origin) -> Iterator[Any]:
    caller = getattr(manager.hook, hook)
    try:
        results = caller()
        if len(results) < sum(not (one.hookwrapper or one.wrapper) for one in caller.get_hookimpls()):
            raise TypeError("it returned None, not a list")  # pluggy leaves None out of the results
        for result in results:
            if isinstance(result, (str, Kind)) or not isinstance(result, Iterable):  # a kind gives its fields
                raise TypeError(f"it returned {result!r}, not a list")
        offers = [offer for result in results for offer in result]
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever the plugin raises, its user must learn which plugin it was
        raise PluginError(f"plugin {origin}: {hook} failed: {_shown(error)}") from error
    yield from offers


def _module_classes(adapter: Adapter, origin: Origin) -> list[tuple[ModuleClass, Adapter]]:
    """The classes of modules that an adapter knows.

    Raises PluginError where the adapter's `modules`, `gates` or `roles` are malformed.
    """
    name, classes = type(adapter).__name__, getattr(adapter, "modules", None)
    if not isinstance(classes, tuple) or not classes or not all(map(_is_module_class, classes)):
        raise PluginError(
            f"plugin {origin}: {name}.modules must be a tuple of nn.Module classes or of names such as "
            f"'package.module:Class', got {classes!r}"
        )
    for what, words in (("gates", adapter.gates), ("roles", adapter.roles)):
        if not isinstance(words, tuple) or not all(isinstance(word, str) and word.isidentifier() for word in words):
            raise PluginError(f"plugin {origin}: {name}.{what} must be a tuple of names, got {words!r}")
    if aliases := sorted(set(adapter.gates) & set(GATE_ALIASES)):
        raise PluginError(f"plugin {origin}: {name}.gates has {aliases}, which documents use for other gates")
    return [(known, adapter) for known in classes]


def _is_module_class(known: object) -> bool:
    if isinstance(known, str):
        return _CLASS_NAME.fullmatch(known) is not None
    return isinstance(known, type) and issubclass(known, nn.Module)


def clashes(points: Sequence[tuple[metadata.EntryPoint, Origin]]) -> Iterator[str]:
    """A sentence for each two distributions with entry points of one name: pluggy would silently leave one out."""
    first: dict[str, tuple[metadata.EntryPoint, Origin]] = {}
    for point, origin in points:
        other = first.setdefault(point.name, (point, origin))
        if other[0] is not point:
            yield (
                f"two distributions have an entry point {point.name!r}: {other[1]} ({other[0].value}) and {origin} "
                f"({point.value})"
            )
