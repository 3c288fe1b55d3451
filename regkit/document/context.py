"""The context of reading a document: its registry and provenance, and the treatment of kinds that are not installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationInfo

from regkit.adapters import GATE_ALIASES
from regkit.kinds import Kind
from regkit.registry.entries import canonical
from regkit.registry.names import OWN
from regkit.registry.registry import Registry, default

Unknown = Literal["error", "keep"]
"""The treatment of a kind that no plugin offers."""


Words = tuple[Sequence[str], Sequence[str]]
"""Roles and gates, such as those of one model."""


class MissingKind(Kind):
    """A kind that no plugin offers here, kept for tools that edit documents. Its rule can only be saved again."""

    kind: str
    """The name of the kind."""

    given: Any
    """The value in the document, in shorthand or not."""

    saved: Any = None
    """The provenance of the kind in the document."""

    reason: str
    """The sentence that says why the kind is missing."""

    def __hash__(self) -> int:  # `given` may be a dict
        return hash(self.kind)

    def describe(self) -> str:
        return f"{self.kind} (not installed)"


@dataclass(frozen=True)
class ReadingContext:
    """The context in which a document is read.

    registry: the kinds and adapters at hand. provenance: the document's own, by names of kinds, as far as given.
    unknown: the treatment of kinds that no plugin offers.
    words: gives the roles and the gates of the model that the document is for; None where that is not known.
    """

    registry: Registry
    provenance: Mapping[str, Any]
    unknown: Unknown = "error"
    words: Callable[[], Words] | None = None

    @property
    def roles(self) -> Sequence[str]:
        """The roles to tell of where one is unknown: of the model at hand, else all."""
        return self.registry.roles if self.words is None else self.words()[0]

    @property
    def gates(self) -> Sequence[str]:
        """The gates to tell of where one is unknown: of the model at hand, else all, with their letters."""
        return [*self.registry.gates, *GATE_ALIASES] if self.words is None else self.words()[1]

    @classmethod
    def from_validation(cls, info: ValidationInfo) -> ReadingContext:
        """The context that a validation is part of; outside of any reading, one with the default registry."""
        reading = (info.context or {}).get("reading")
        return reading if isinstance(reading, ReadingContext) else cls(default(), {})

    def saved(self, name: str) -> Mapping[str, Any] | None:
        """The provenance of a kind, if the document has a readable one.

        The distribution `regkit` is read as `torch-regkit`, whose name it was when older documents were saved.
        """
        found = self.provenance.get(name)
        if not isinstance(found, dict) or not isinstance(distribution := found.get("distribution"), str):
            return None
        return {**found, "distribution": OWN if canonical(distribution) == "regkit" else distribution}

    def absence(self, name: str) -> str:
        """A sentence to append that says why a kind may be missing; empty where nothing is known."""
        saved = self.saved(name) or {}
        version = saved.get("version")
        return self.registry.absence(name, saved.get("distribution"), version if isinstance(version, str) else None)
