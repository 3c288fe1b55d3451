"""The entries of a registry: kinds, each with its family, name and origin."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from regkit.errors import PluginError
from regkit.kinds import ActivityPenalty, Constraint, Kind, Penalty, Schedule
from regkit.registry.names import RESERVED, Family

CONTRACTS: Final[Mapping[Family, type[Kind]]] = {
    "penalty": Penalty,
    "activity penalty": ActivityPenalty,
    "constraint": Constraint,
    "schedule": Schedule,
}
"""The class that every kind of a family is made from."""

_NAME: Final = re.compile(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)*")
_LONGEST_NAME: Final = 100
_DISTRIBUTION: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_VERSION: Final = re.compile(
    r"([0-9]{1,9}!)?[0-9]{1,9}(\.[0-9]{1,9}){0,9}((a|b|rc)[0-9]{1,9})?(\.post[0-9]{1,9})?(\.dev[0-9]{1,9})?"
    r"(\+[a-z0-9]{1,40}([._-][a-z0-9]{1,40}){0,9})?"
)


def canonical(distribution: str) -> str:
    """The name of a distribution in the form in which installers compare names  (PEP 503)."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def installable(distribution: str, version: str | None) -> bool:
    """Whether a name and a version are such as installers take  (PEP 508 and 440): no option, no address, no blank."""
    return len(distribution) <= _LONGEST_NAME and bool(
        _DISTRIBUTION.fullmatch(distribution) and (version is None or _VERSION.fullmatch(version))
    )


def full_name(cls: type | str) -> str:
    """The name of a class as `package.module:Class`; a name in this form is returned unchanged."""
    return cls if isinstance(cls, str) else f"{cls.__module__}:{cls.__qualname__}"


@dataclass(frozen=True)
class Origin:
    """The source of a plugin: a distribution, its version, and the name of the plugin's entry point there.

    A plugin that was registered in-process has its module for a distribution, and neither version nor entry point.
    """

    distribution: str
    version: str | None = None
    point: str | None = None

    @property
    def installed(self) -> bool:
        """Whether the plugin came through the entry point of an installed distribution."""
        return self.point is not None

    @property
    def names(self) -> frozenset[str]:
        """The plugin's names in allow and block lists: distribution, entry point, and `distribution:entry_point`."""
        whole = canonical(self.distribution)
        point = canonical(self.point or whole)
        return frozenset({whole, point, f"{whole}:{point}"})

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

    @property
    def file(self) -> str | None:
        """The source file of the class; a class that was typed in has neither file nor line."""
        return None if self.line is None else inspect.getsourcefile(self.kind)

    @property
    def line(self) -> int | None:
        """The line on which the class begins, where there is a source."""
        try:
            lines, first = inspect.getsourcelines(self.kind)
        except (OSError, TypeError):
            return None
        # Since Python 3.13 a class that was typed in is looked up by its line in the file of `__main__`, if any.
        return first if any(f"class {self.kind.__name__}" in line for line in lines) else None

    def redefines(self, other: Entry) -> bool:
        """Whether this is the other's class again, as when a notebook's cell is run again or a module is reloaded."""
        again = full_name(self.kind) == full_name(other.kind)
        return again and self.origin == other.origin and not self.origin.installed

    def made(self, kind: Kind) -> bool:
        """Whether a kind is of this very class, or of the class that an earlier run of its cell or module defined."""
        return full_name(type(kind)) == full_name(self.kind)


def entry_of(offer: object, family: Family, origin: Origin) -> Entry:
    """The entry of a kind that a plugin offers.

    Raises PluginError where the offer is no kind of this family, or may not have its name.
    """
    contract = CONTRACTS[family]
    if not (isinstance(offer, type) and issubclass(offer, contract)):
        raise PluginError(f"plugin {origin}: {offer!r} is not a {family}: it must be a subclass of {contract.__name__}")
    if missing := sorted(offer.__abstractmethods__):
        raise PluginError(f"plugin {origin}: {offer.__qualname__} lacks {', '.join(missing)}")
    name = offer.kind_name()
    if not _NAME.fullmatch(name) or len(name) > _LONGEST_NAME:
        raise PluginError(f"plugin {origin}: a kind is named in lower_case, with dots at most, not {name!r}")
    if name in RESERVED:
        raise PluginError(
            f"plugin {origin}: no kind may be named {name!r}; reserved are: {', '.join(sorted(RESERVED))}"
        )
    _refuse_foreign_prefix(name, origin)
    return Entry(family, name, offer, origin)


def _refuse_foreign_prefix(name: str, origin: Origin) -> None:
    """Raise PluginError for a name with a dot unless the part before the first dot is the distribution's own name."""
    prefix, dot, rest = name.partition(".")
    own = canonical(origin.distribution).replace("-", "_")
    if not dot or prefix == own or (prefix not in ("regkit", "torch_regkit") and not origin.installed):
        return
    raise PluginError(f"plugin {origin} may not name a kind {name!r}: it may be {rest!r}, or {f'{own}.{rest}'!r}")
