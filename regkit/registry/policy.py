"""Which installed plugins may be imported: said by code and by the environment, never by a document.

REGKIT_PLUGINS: only these, of those that are not regkit's own. REGKIT_DISABLE_PLUGINS: not these, whoever's they are.
Both hold names of distributions or of entry points, or `distribution:entry_point`, with commas between.
REGKIT_STRICT_PLUGINS=1: one broken plugin is an error at once.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from regkit.errors import PluginError, PluginWarning, listing, nearest
from regkit.registry.entries import Origin, canonical
from regkit.registry.names import OWN


@dataclass(frozen=True)
class _List:
    """Names of plugins, and who gave them."""

    giver: str
    names: frozenset[str]

    def holds(self, origin: Origin) -> bool:
        return bool(self.names & origin.names)

    def strays(self, origins: Iterable[Origin]) -> Iterator[tuple[str, str]]:
        """The names that are no plugin's, each with a hint at the nearest that is."""
        known = sorted({name for origin in origins for name in origin.names})
        for name in sorted(self.names - set(known)):
            near = nearest(name, known)
            yield name, f"; did you mean {near!r}?" if near else f". Installed: {listing(known)}"


@dataclass(frozen=True)
class Policy:
    """What may be imported: all lists in `allow` must hold a plugin that is not regkit's own, none in `block` may."""

    allow: tuple[_List, ...] = ()
    block: tuple[_List, ...] = ()
    strict: bool = False

    @classmethod
    def of(cls, allow: Iterable[str] | None, block: Iterable[str], said: Mapping[str, str] = os.environ) -> Policy:
        """The policy of a program and its environment. Raises PluginError where the latter cannot be understood."""
        only, never = _words(said.get("REGKIT_PLUGINS", "")), _words(said.get("REGKIT_DISABLE_PLUGINS", ""))
        allowing = [("allow=", allow), ("REGKIT_PLUGINS", only or None)]
        blocking = [("block=", block), ("REGKIT_DISABLE_PLUGINS", never)]
        return cls(
            tuple(_listed(giver, names) for giver, names in allowing if names is not None),
            tuple(_listed(giver, names) for giver, names in blocking if names),
            _flag(said.get("REGKIT_STRICT_PLUGINS", "")),
        )

    def verdict(self, origin: Origin) -> str | None:
        """Why a plugin may not be imported, or None where it may."""
        for one in self.block:
            if one.holds(origin):
                return f"{one.giver} names it"
        for one in self.allow:
            if canonical(origin.distribution) != OWN and not one.holds(origin):
                return f"{one.giver} does not name it"
        return None

    def verify_names(self, origins: Iterable[Origin]) -> None:
        """Raise PluginError for an allowed name that nothing has; warn of a blocked one.

        A list of what to block may be shared by environments that do not all have it.
        """
        everything = list(origins)
        for one in self.allow:
            for name, hint in one.strays(everything):
                raise PluginError(f"{one.giver} names {name!r}, which no installed plugin is{hint}")
        for one in self.block:
            for name, hint in one.strays(everything):
                sentence = f"{one.giver} names {name!r}, which no installed plugin is{hint}"
                warnings.warn(sentence, PluginWarning, stacklevel=5)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _listed(giver: str, names: Iterable[str]) -> _List:
    if isinstance(names, str):
        raise PluginError(f"{giver} is a list of names, not the string {names!r}")
    return _List(giver, frozenset(":".join(map(canonical, name.split(":"))) for name in names))


def _flag(value: str) -> bool:
    if value not in ("", "0", "1"):
        raise PluginError(f"REGKIT_STRICT_PLUGINS is 1 or 0, not {value!r}")
    return value == "1"
