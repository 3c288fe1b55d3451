"""The plan: every rule of a document bound to concrete places of one model.

Everything that can be decided before training is decided here, and every rule that does not fit is told at once. A plan
holds names and numbers, no tensors and no modules; `print(plan)` shows what will be optimized.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch import nn

from regkit import document
from regkit.binding import Binding, Unbound, bind
from regkit.errors import Problem, ResolveError, listing
from regkit.modules import Recurrent, named_modules, recurrent_modules
from regkit.registry import Registry, default
from regkit.spec import Spec
from regkit.table import table

_HEADER: Final = (
    "rule",
    "kind",
    "module",
    "parameter",
    "role",
    "layer",
    "direction",
    "gate",
    "shape",
    "reaches it",
)


@dataclass(frozen=True)
class Plan:
    """Every rule of a spec, bound to a model's sites, in the document's order."""

    bindings: tuple[Binding, ...]

    def rows(self) -> list[tuple[str, ...]]:
        """The cells of the table, a row for each site."""
        return [row for binding in self.bindings for row in _rows(binding)]

    def __str__(self) -> str:
        return table(_HEADER, self.rows())


def _rows(binding: Binding) -> Iterator[tuple[str, ...]]:
    head, tail = (binding.key, binding.title), binding.reach
    for w in binding.weights:
        place = (
            w.name or "(model)",
            " + ".join(w.parameters),
            w.role,
            str(w.layer),
            w.direction,
            w.gate or "all",
        )
        yield (*head, *place, " × ".join(map(str, w.shape)), tail)
    for o in binding.outputs:
        layers, directions = ", ".join(map(str, o.layers)), ", ".join(o.directions)
        yield (*head, o.name or "(model)", "", o.role, layers, directions, "", "", tail)
    if not binding.weights and not binding.outputs:
        yield (*head, "(nothing: optional)", "", "", "", "", "", "", "")


def resolve(model: nn.Module, spec: str | Path | dict[str, Any] | Spec, *, registry: Registry | None = None) -> Plan:
    """Bind every rule of the spec to the model.

    Raises SpecError for a bad document, ResolveError with every rule that does not fit the model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"a model is an nn.Module, not {type(model).__name__}")
    registry = registry or default()
    spec = document.load(spec, registry=registry)
    everywhere = recurrent_modules(model, registry)
    bindings: list[Binding] = []
    problems: list[Problem] = []
    for key, rule in spec.keyed_rules().items():
        try:
            bindings.append(bind(key, rule, everywhere))
        except Unbound as error:
            problems.append(Problem(key, _sentence(str(error), model, everywhere, registry)))
    if problems:
        raise ResolveError("the spec", problems)
    return Plan(tuple(bindings))


def _sentence(reason: str, model: nn.Module, everywhere: list[Recurrent], registry: Registry) -> str:
    if everywhere:
        return reason
    classes = listing(sorted({type(module).__name__ for _, _, module in named_modules(model)}))
    return f"the model has no recurrent module. It has: {classes}; known are: {listing(registry.module_classes)}"
