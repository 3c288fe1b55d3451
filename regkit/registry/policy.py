"""The policy by which installed plugins may be imported: set by code and by the environment, never by a document.

REGKIT_PLUGINS: of plugins that are not regkit's own, only these. REGKIT_DISABLE_PLUGINS: none of these, even regkit's.
Both hold names of distributions or of entry points, or `distribution:entry_point`, with commas between.
REGKIT_STRICT_PLUGINS=1: one broken plugin is an error at once.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from regkit.errors import PluginError, PluginWarning, hint, listing
from regkit.registry.entries import Origin, canonical
from regkit.registry.names import OWN


@dataclass(frozen=True)
class _NameList:
    """Names of plugins, and the argument or variable that gives the names."""

    source: str
    names: frozenset[str]

    def holds(self, origin: Origin) -> bool:
        return bool(self.names & origin.names)

    def unmatched(self, origins: Iterable[Origin]) -> Iterator[str]:
        """A sentence for each name that no plugin has, with the nearest name that one has."""
        known = sorted({name for origin in origins for name in origin.names})
        for name in sorted(self.names - set(known)):
            near = hint(name, known, f". Installed: {listing(known)}")
            yield f"{self.source} names {name!r}, which no installed plugin is{near}"


@dataclass(frozen=True)
class Policy:
    """The choice of plugins to import: regkit's own and all that `allow` names, except all that `block` names.

    allow: lists of which every one must name a plugin that is not regkit's own.
    block: lists of which none may name a plugin. strict: whether a broken plugin is an error at once.
    """

    allow: tuple[_NameList, ...] = ()
    block: tuple[_NameList, ...] = ()
    strict: bool = False

    @classmethod
    def from_environment(
        cls, allow: Iterable[str] | None, block: Iterable[str], variables: Mapping[str, str] = os.environ
    ) -> Policy:
        """The policy of a program and its environment. Raises PluginError where a variable cannot be understood."""
        only, never = (_words(variables.get(name, "")) for name in ("REGKIT_PLUGINS", "REGKIT_DISABLE_PLUGINS"))
        allowing = [("allow=", allow), ("REGKIT_PLUGINS", only or None)]
        blocking = [("block=", block), ("REGKIT_DISABLE_PLUGINS", never)]
        return cls(
            tuple(_name_list(source, names) for source, names in allowing if names is not None),
            tuple(_name_list(source, names) for source, names in blocking if names),
            _flag(variables.get("REGKIT_STRICT_PLUGINS", "")),
        )

    def verdict(self, origin: Origin) -> str | None:
        """The reason why a plugin may not be imported, or None where nothing forbids its import."""
        for one in self.block:
            if one.holds(origin):
                return f"{one.source} names it"
        for one in self.allow:
            if canonical(origin.distribution) != OWN and not one.holds(origin):
                return f"{one.source} does not name it"
        return None

    def verify_names(self, origins: Iterable[Origin]) -> None:
        """Raise PluginError for an allowed name that no plugin has; warn of such a name that is blocked.

        A list of plugins to block may be shared by environments that do not have all of them.
        """
        everything = list(origins)
        for one in self.allow:
            for sentence in one.unmatched(everything):
                raise PluginError(sentence)
        for one in self.block:
            for sentence in one.unmatched(everything):
                warnings.warn(sentence, PluginWarning, stacklevel=5)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _name_list(source: str, names: Iterable[str]) -> _NameList:
    if isinstance(names, str):
        raise PluginError(f"{source} is a list of names, not the string {names!r}")
    return _NameList(source, frozenset(":".join(map(canonical, name.split(":"))) for name in names))


def _flag(value: str) -> bool:
    if value not in ("", "0", "1"):
        raise PluginError(f"REGKIT_STRICT_PLUGINS is 1 or 0, not {value!r}")
    return value == "1"
