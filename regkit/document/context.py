"""Kinds that are not here: kept as they were written, for tools that edit documents of other people's plugins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationInfo

from regkit.kinds import Kind
from regkit.registry.entries import canonical
from regkit.registry.names import OWN
from regkit.registry.registry import Registry, default

Unknown = Literal["error", "keep"]
"""What to do with a kind that no plugin offers."""


class MissingKind(Kind):
    """A kind that no plugin offers here. A rule with one can be kept and saved again, and nothing else."""

    kind: str
    """Its name."""

    given: Any
    """What stood in the document, shorthand or not."""

    saved: Any = None
    """The provenance it was saved with."""

    reason: str
    """Why it is not here."""

    def __hash__(self) -> int:  # what was given may be a dict
        return hash(self.kind)

    def describe(self) -> str:
        return f"{self.kind} (not installed)"


@dataclass(frozen=True)
class ReadingContext:
    """What a reader of a document brings to it: a registry, where kinds came from, what to do with unknown ones."""

    registry: Registry
    provenance: Mapping[str, Any]
    unknown: Unknown = "error"

    @classmethod
    def of(cls, info: ValidationInfo) -> ReadingContext:
        """The reading that validation is a part of; outside of any, with the registry of everything installed."""
        reading = (info.context or {}).get("reading")
        return reading if isinstance(reading, ReadingContext) else cls(default(), {})

    def saved(self, name: str) -> Mapping[str, Any] | None:
        """The provenance of a kind, where there is one that can be read.

        Documents that were saved when regkit's own distribution was called `regkit` are read as if by its current name.
        """
        found = self.provenance.get(name)
        if not isinstance(found, dict) or not isinstance(distribution := found.get("distribution"), str):
            return None
        return {**found, "distribution": OWN if canonical(distribution) == "regkit" else distribution}

    def absence(self, name: str) -> str:
        """Why a kind may be missing: a sentence to append, or none."""
        saved = self.saved(name) or {}
        return self.registry.absence(name, saved.get("distribution"), saved.get("version"))
