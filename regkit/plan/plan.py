"""The plan: every rule of a document bound to concrete places of one model.

Everything that can be decided before training is decided here, and every rule that does not fit is reported at once. A
plan holds names and numbers, no tensors and no modules; `print(plan)` shows what will be optimized.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from regkit import _pickled
from regkit.adapters import WeightSite, oriented
from regkit.document import reader
from regkit.document.context import MissingKind
from regkit.document.spec import Rule, Spec
from regkit.errors import AttachError, Problem, ResolveError, few_hints, listing
from regkit.plan.binding import Binding
from regkit.plan.candidates import Candidates
from regkit.plan.modules import class_name, named_modules, recurrent_modules
from regkit.plan.selection import DoesNotFit, bind
from regkit.plan.table import table
from regkit.registry.registry import Registry, default
from regkit.weights.locate import storage_of

_HEADER: Final = ("rule", "kind", "module", "parameter", "role", "layer", "direction", "gate", "shape", "how it acts")

_Shapes = dict[tuple[str | None, ...], tuple[int, ...]]
"""The shapes of weights by path, parameter, `through` and `mask`: several rules may ask for one shape."""


@dataclass(frozen=True)
class Plan:
    """Every rule of a spec, bound to a model's sites, in the document's order.

    >>> plan = regkit.resolve(nn.LSTM(3, 4), {"rules": [{"target": {"role": "recurrent"}, "penalty": "l2(1e-4)"}]})
    >>> plan.rows()[0][1:9]
    ('l2(strength=0.0001)', '(model)', 'weight_hh_l0', 'recurrent', '0', 'forward', 'all', '16 × 4')
    """

    bindings: tuple[Binding, ...]
    """The rules, each with its sites."""

    registry: Registry = field(repr=False, compare=False)
    """The registry of the rules' kinds and of the modules' adapters."""

    spec: Spec | None = field(default=None, repr=False, compare=False)
    """The spec that was resolved; None for a plan that was unpickled."""

    def rows(self) -> list[tuple[str, ...]]:
        """The cells of the table, a row for each site."""
        return [row for binding in self.bindings for row in _rows(binding)]

    def check(self, model: nn.Module) -> None:
        """Raise AttachError unless every site of the plan is on the model, of its class and shape."""
        modules = dict(model.named_modules(remove_duplicate=False))
        classes = {path: class_name(module) for path, module in modules.items()}
        shapes: _Shapes = {}
        for binding in self.bindings:
            for site in binding.sites:
                module, has = modules.get(site.path), classes.get(site.path, "nothing")
                if module is None or has != site.module_class:
                    raise _of_another_model(f"{site.path!r} is {has} here, {site.module_class} in the plan")
                if isinstance(site, WeightSite):
                    _check_shape(site, module, modules.get(site.path.rpartition(".")[0]), shapes)
                elif self.registry.adapter(module) is None:
                    raise AttachError(
                        f"no adapter for {has} is known here, and {binding.key} needs one: import what registers it, "
                        "or resolve the spec anew"
                    )

    def __str__(self) -> str:
        return table(_HEADER, self.rows())

    def __deepcopy__(self, memo: object) -> Plan:
        return self  # frozen

    def __reduce__(self) -> _pickled.Call:
        return _pickled.reduce_plan(self)


def _rows(binding: Binding) -> Iterator[tuple[str, ...]]:
    head, tail, frozen = (binding.key, binding.title), binding.how_it_acts, set(binding.frozen)
    for w in binding.weights:
        place = (w.name or "(model)", w.parameter, w.role, str(w.layer), w.direction, w.gate or "all")
        yield (*head, *place, " × ".join(map(str, w.shape)), "frozen: left alone" if w in frozen else tail)
    for o in binding.outputs:
        layers, directions = ", ".join(map(str, o.layers)), ", ".join(o.directions)
        yield (*head, o.name or "(model)", "", o.role, layers, directions, "", "", tail)
    for module, name in binding.uncovered:
        yield (*head, module or "(model)", name, *[""] * 5, "LEFT ALONE: no adapter describes it")
    for item in binding.absent:
        yield (*head, f"(no {item}: optional)", *[""] * 7)


def resolve(model: nn.Module, spec: str | Path | dict[str, Any] | Spec, *, registry: Registry | None = None) -> Plan:
    """Bind every rule of the spec to the model.

    Raises SpecError for a bad document, ResolveError with every rule that does not fit the model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"a model is an nn.Module, not {type(model).__name__}")
    registry = registry or default()
    candidates = Candidates(recurrent_modules(model, registry), model)
    spec = reader.read(spec, registry, words=lambda: candidates.words)
    bindings: list[Binding] = []
    problems: list[Problem] = []
    with few_hints():
        for key, rule in spec.keyed_rules().items():
            try:
                bindings.append(_bound(key, rule, candidates, registry))
            except DoesNotFit as error:
                problems.append(Problem(key, str(error), *spec.place(key, rule)))
    if problems and not candidates.modules:
        raise ResolveError("the spec", [Problem("", _nothing_recurrent(model, registry))])
    if problems:
        raise ResolveError("the spec", problems)
    return Plan(tuple(bindings), registry, spec)


def _bound(key: str, rule: Rule, candidates: Candidates, registry: Registry) -> Binding:
    """A rule's binding. Raises DoesNotFit."""
    for kind in (rule.kind, rule.schedule):
        if isinstance(kind, MissingKind):
            raise DoesNotFit(kind.reason)
    entry = registry.find(rule.kind.kind)
    origin = rule.kind.__class__.__module__ if entry is None else str(entry.origin)
    return replace(bind(key, rule, candidates), origin=origin)


def _nothing_recurrent(model: nn.Module, registry: Registry) -> str:
    classes = listing(sorted({type(module).__name__ for _, _, module in named_modules(model)}))
    known = listing(registry.module_classes)
    return f"the model has no recurrent module. It has: {classes}; known are: {known}{registry.idle('know one')}"


def _check_shape(site: WeightSite, module: nn.Module, parent: nn.Module | None, shapes: _Shapes) -> None:
    for name in site.parameters:
        weight = site.path, name, site.through, site.mask
        if weight not in shapes:
            try:
                with torch.no_grad():
                    shapes[weight] = tuple(storage_of(module, parent, name, site.through, site.mask).outline().shape)
            except AttachError as error:
                raise _of_another_model(f"{site.path}: {error}") from None
        if not _fits(site, shapes[weight]):
            raise _of_another_model(f"{site.path}.{name} is {shapes[weight]} here, {site.shape} in the plan")


def _fits(site: WeightSite, shape: tuple[int, ...]) -> bool:
    if site.transposed or site.columns is not None:
        try:
            shape = oriented(torch.empty(shape, device="meta"), site.transposed, site.columns).shape
        except (IndexError, RuntimeError):
            return False
    return len(shape) > 0 and shape[1:] == site.shape[1:] and shape[0] >= site.start + site.rows


def _of_another_model(difference: str) -> AttachError:
    return AttachError(f"the plan is of another model: {difference}")
