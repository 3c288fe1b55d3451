"""One plugin on its own: from an entry point or an object to what it offers, or to what is wrong with it."""

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
from regkit.registry.entries import CONTRACTS, Entry, Origin, canonical, entry_of
from regkit.registry.names import Family

HOOKS: Final[dict[str, Family]] = {
    "regkit_penalties": "penalty",
    "regkit_activity_penalties": "activity penalty",
    "regkit_constraints": "constraint",
    "regkit_schedules": "schedule",
}
"""The hooks that offer kinds; beside them there is `regkit_adapters`."""

Known = type[nn.Module] | str
"""A class of modules, or its `package.module:Class` where it need not be imported."""

_CLASS: Final = re.compile(r"[A-Za-z_]\w*(\.\w+)*:[A-Za-z_]\w*(\.\w+)*")


@dataclass
class PluginOffers:
    """What a plugin offers."""

    origin: Origin
    kinds: list[Entry] = field(default_factory=list)
    adapters: list[tuple[Known, Adapter]] = field(default_factory=list)


@dataclass(frozen=True)
class Plugin:
    """What became of a plugin.

    place: where it is, as `package.module` or `package.module:object`. reason: why it is blocked or broken; report: the
    traceback of the latter. kinds, adapters: what it offers, as far as that is known.
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
    """Every entry point of group `regkit`, by distribution and name.

    What an installer has left behind twice (`~egkit-0.1.dist-info`) is one.
    """
    once: dict[tuple[str, str, str], tuple[metadata.EntryPoint, Origin]] = {}
    for point in metadata.entry_points(group=hookspecs.GROUP):
        origin = _origin(point)
        once.setdefault((canonical(origin.distribution), point.name, point.value), (point, origin))
    return sorted(once.values(), key=lambda pair: (pair[1].distribution.lower(), pair[0].name))


def _origin(point: metadata.EntryPoint) -> Origin:
    # By hand, as in a frozen program, there is no distribution; a half uninstalled one has no metadata, and so no name.
    if point.dist is None or not point.dist.name:
        return Origin(point.value.partition(":")[0], None, point.name)
    return Origin(point.dist.name, point.dist.version, point.name)


def loaded(point: metadata.EntryPoint, origin: Origin) -> tuple[Plugin, PluginOffers]:
    """Import a plugin and ask what it offers. Whatever it does wrong is its own affair: then it offers nothing."""
    offers = PluginOffers(origin)
    try:
        with _asked():
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
    except BaseException as error:  # an import runs a stranger's code: anything can come out
        raise PluginError(f"plugin {point.name!r} of {origin} does not import: {_said(error)}") from error
    if getattr(getattr(sys.modules.get(point.module), "__spec__", None), "_initializing", False):
        raise PluginError(
            f"plugin {point.name!r} of {origin} is half imported: {point.module} needs regkit's kinds while it is "
            "imported, and regkit needs what it offers; read documents and register kinds inside functions"
        )
    return plugin


_asking: Final = threading.local()


@contextmanager
def _asked() -> Iterator[None]:
    before, _asking.now = being_asked(), True
    try:
        yield
    finally:
        _asking.now = before


def being_asked() -> bool:
    """Whether this thread is in the code of an installed plugin, to import it or to ask what it offers."""
    return getattr(_asking, "now", False)


def _said(error: BaseException) -> str:
    try:
        return repr(error)
    except Exception:  # its own repr fails, too
        return type(error).__name__


def record(place: str, offers: PluginOffers, *, reason: str = "", report: str = "") -> Plugin:
    """The record of a plugin that was loaded, or is broken for a reason."""
    kinds = tuple(entry.name for entry in offers.kinds)
    adapters = tuple(name_of(known) for known, _ in offers.adapters)
    return Plugin(offers.origin, place, "broken" if reason else "loaded", reason, report, kinds, adapters)


def place_of(plugin: object) -> str:
    """Where an object of this process was written."""
    if isinstance(plugin, ModuleType):
        return plugin.__name__
    cls = plugin if isinstance(plugin, type) else type(plugin)
    return f"{cls.__module__}:{cls.__qualname__}"


def same(one: Known, other: Known) -> bool:
    """Whether two adapters that know these would both know one class."""
    return one == other or (isinstance(one, str) != isinstance(other, str) and _full(one) == _full(other))


def _full(known: Known) -> str:
    return known if isinstance(known, str) else f"{known.__module__}:{known.__qualname__}"


def name_of(known: Known) -> str:
    """The class' own name."""
    return known.rpartition(":")[2] if isinstance(known, str) else known.__name__


def ask(plugin: object, offers: PluginOffers, specs: ModuleType = hookspecs) -> None:
    """Put what a plugin offers into `offers`: an object with hooks, or a kind or an adapter itself.

    Raises PluginError for what cannot be used; `offers` then holds what came before it.
    """
    try:
        _ask(plugin, offers, specs)
    except (PluginError, KeyboardInterrupt):
        raise
    except BaseException as error:  # a stranger's class answers questions in its own way
        raise PluginError(f"plugin {offers.origin}: {_said(error)}") from error
    names = [entry.name for entry in offers.kinds]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise PluginError(f"plugin {offers.origin} offers the kind {twice[0]!r} twice")
    for index, (known, _) in enumerate(offers.adapters):
        if any(same(known, other) for other, _ in offers.adapters[:index]):
            raise PluginError(f"plugin {offers.origin} offers an adapter for {name_of(known)} twice")


def _ask(plugin: object, offers: PluginOffers, specs: ModuleType) -> None:
    origin = offers.origin
    if isinstance(plugin, type) and issubclass(plugin, Kind):
        fitting: list[Family] = [name for name, contract in CONTRACTS.items() if issubclass(plugin, contract)]
        offers.kinds.append(entry_of(plugin, fitting[0] if fitting else "penalty", origin))
    elif isinstance(plugin, Adapter) or (isinstance(plugin, type) and issubclass(plugin, Adapter)):
        offers.adapters.extend(_known(_made(plugin, origin), origin))
    else:
        _ask_hooks(plugin, offers, specs)


def _made(plugin: Adapter | type[Adapter], origin: Origin) -> Adapter:
    if isinstance(plugin, Adapter):
        return plugin
    try:
        return plugin()
    except Exception as error:  # an abstract class, or a stranger's __init__
        raise PluginError(f"plugin {origin}: {plugin.__qualname__}() failed: {error}") from error


def _ask_hooks(plugin: object, offers: PluginOffers, specs: ModuleType) -> None:
    origin = offers.origin
    # A manager for each: pluggy's own then sees wrappers, arguments that grow and deprecations, and no other plugin.
    manager = pluggy.PluginManager(hookspecs.GROUP)
    manager.add_hookspecs(specs)
    try:
        manager.register(plugin, str(origin))
    except Exception as error:  # pluggy reads every attribute of a stranger's object
        raise PluginError(f"plugin {origin}: {error}") from error
    hooks, callers = [*HOOKS, "regkit_adapters"], manager.get_hookcallers(plugin)
    if not callers:
        raise PluginError(f"plugin {origin} implements no hook; hooks are: {listing(hooks)}")
    for caller in callers:
        if not caller.has_spec() and not all(one.optionalhook for one in caller.get_hookimpls()):
            raise PluginError(f"plugin {origin}: {unknown('hook', caller.name, hooks)}")
    for hook, family in HOOKS.items():
        for offer in _call(manager, hook, origin):
            offers.kinds.append(entry_of(offer, family, origin))
    for adapter in _call(manager, "regkit_adapters", origin):
        if not isinstance(adapter, Adapter):
            raise PluginError(f"plugin {origin}: regkit_adapters offers {adapter!r}, which is not an Adapter")
        offers.adapters.extend(_known(adapter, origin))


def _call(manager: pluggy.PluginManager, hook: str, origin: Origin) -> Iterator[Any]:
    caller = getattr(manager.hook, hook)
    try:
        results = caller()
        if len(results) < sum(not (one.hookwrapper or one.wrapper) for one in caller.get_hookimpls()):
            raise TypeError("it returned None, not a list")  # pluggy leaves that out
        for result in results:
            if isinstance(result, (str, Kind)) or not isinstance(result, Iterable):  # a kind would give its options
                raise TypeError(f"it returned {result!r}, not a list")
        offers = [offer for result in results for offer in result]
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a stranger's code raises, its user must learn whose it was
        raise PluginError(f"plugin {origin}: {hook} failed: {_said(error)}") from error
    yield from offers


def _known(adapter: Adapter, origin: Origin) -> list[tuple[Known, Adapter]]:
    """What an adapter knows. Raises PluginError unless it says that, its gates and its roles as it should."""
    name, classes = type(adapter).__name__, getattr(adapter, "modules", None)
    if not isinstance(classes, tuple) or not classes or not all(map(_is_known, classes)):
        raise PluginError(
            f"plugin {origin}: {name}.modules must be a tuple of nn.Module classes or of names such as "
            f"'package.module:Class', got {classes!r}"
        )
    for what, words in (("gates", adapter.gates), ("roles", adapter.roles)):
        if not isinstance(words, tuple) or not all(isinstance(word, str) and word.isidentifier() for word in words):
            raise PluginError(f"plugin {origin}: {name}.{what} must be a tuple of names, got {words!r}")
    if taken := sorted(set(adapter.gates) & set(GATE_ALIASES)):
        raise PluginError(f"plugin {origin}: {name}.gates has {taken}, which documents use for other gates")
    return [(known, adapter) for known in classes]


def _is_known(known: object) -> bool:
    if isinstance(known, str):
        return _CLASS.fullmatch(known) is not None
    return isinstance(known, type) and issubclass(known, nn.Module)


def clashes(points: Sequence[tuple[metadata.EntryPoint, Origin]]) -> Iterator[str]:
    """What is wrong where two distributions name an entry point alike: pluggy would leave one out without a word."""
    first: dict[str, tuple[metadata.EntryPoint, Origin]] = {}
    for point, origin in points:
        other = first.setdefault(point.name, (point, origin))
        if other[0] is not point:
            yield (
                f"two distributions have an entry point {point.name!r}: {other[1]} ({other[0].value}) and {origin} "
                f"({point.value})"
            )
