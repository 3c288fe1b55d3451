"""The plan: every rule of a document bound to concrete places of one model.

Everything that can be decided before training is decided here, and every rule that does not fit is told at once. A plan
holds names and numbers, no tensors and no modules; `print(plan)` shows what will be optimized.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn

from regkit import document
from regkit.errors import Problem, ResolveError, listing, nearest
from regkit.kinds import ActivityPenalty, Constraint, Layout, Penalty, Schedule
from regkit.modules import Recurrent, matches, named_modules, recurrent_modules
from regkit.registry import Registry, default
from regkit.sites import OUTPUT_ROLES, OutputSite, Weight, WeightSite
from regkit.spec import Rule, Spec, Target, Via
from regkit.table import table


@dataclass(frozen=True)
class Binding:
    """One rule, bound: what acts, on which sites, and how it reaches them."""

    key: str
    kind: Penalty | ActivityPenalty | Constraint
    schedule: Schedule | None
    via: Via
    every: int
    optional: bool
    weights: tuple[WeightSite, ...] = ()
    outputs: tuple[OutputSite, ...] = ()

    @property
    def reach(self) -> str:
        """What of it reaches the weights, and when."""
        if isinstance(self.kind, Constraint):
            return "projected after each step" if self.every == 1 else f"projected after every {self.every} steps"
        return _REACH[self.via]

    @property
    def title(self) -> str:
        """The kind, its options and its schedule."""
        return self.kind.describe() + (f" × {self.schedule.describe()}" if self.schedule else "")


_REACH: Final[dict[str, str]] = {
    "gradient": "added to the gradient at each step",
    "loss": "in penalty(), which the loop adds to the loss",
    "proximal": "proximal operator after each step",
    "decoupled": "decoupled decay at each step",
}
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
        layer = "all" if o.layer is None else str(o.layer)
        yield (*head, o.name or "(model)", "", o.role, layer, o.direction or "all", "", "", tail)
    if not binding.weights and not binding.outputs:
        yield (*head, "(nothing: optional)", "", "", "", "", "", "", "")


def resolve(model: nn.Module, spec: str | Path | dict[str, Any] | Spec, *, registry: Registry | None = None) -> Plan:
    """Bind every rule of the spec to the model.

    Raises SpecError for a bad document, ResolveError with every rule that does not fit the model.
    """
    registry = registry or default()
    spec = document.load(spec, registry=registry)
    everywhere = recurrent_modules(model, registry)
    bindings: list[Binding] = []
    problems: list[Problem] = []
    for key, rule in spec.keyed_rules().items():
        try:
            bindings.append(_bind(key, rule, everywhere))
        except _Unbound as error:
            problems.append(Problem(key, _sentence(str(error), model, everywhere, registry)))
    if problems:
        raise ResolveError("the spec", problems)
    return Plan(tuple(bindings))


class _Unbound(Exception):  # noqa: N818  # a signal within this room; what users see is ResolveError
    """Why a rule does not fit."""


def _sentence(reason: str, model: nn.Module, everywhere: list[Recurrent], registry: Registry) -> str:
    if everywhere:
        return reason
    classes = listing(sorted({type(module).__name__ for _, _, module in named_modules(model)}))
    return f"the model has no recurrent module. It has: {classes}; known are: {listing(registry.module_classes)}"


def _bind(key: str, rule: Rule, everywhere: list[Recurrent]) -> Binding:
    kind = rule.kind
    assert isinstance(kind, (Penalty, ActivityPenalty, Constraint))  # the spec's fields hold no other family
    via: Via = "loss" if isinstance(kind, ActivityPenalty) else rule.via or "gradient"
    schedule = rule.schedule if isinstance(rule.schedule, Schedule) else None
    binding = Binding(key, kind, schedule, via, rule.every, rule.optional)
    try:
        modules = _modules(rule.target, everywhere)
        if isinstance(kind, ActivityPenalty):
            return replace(binding, outputs=_outputs(rule.target, kind, modules))
        return replace(binding, weights=_weights(rule.target, kind, modules))
    except _Missing:
        if rule.optional:
            return binding
        raise


class _Missing(_Unbound):
    """The rule asks for something that the model does not have; an optional rule may."""


def _modules(target: Target, everywhere: list[Recurrent]) -> list[Recurrent]:
    """The modules that the target's patterns cover, each once; every pattern must cover one."""
    patterns = target.module or ("**",)
    for pattern in patterns:
        if not any(matches(pattern, one.name) for one in everywhere):
            near = nearest(pattern, [one.name for one in everywhere if one.name])
            hint = f"; did you mean {near!r}?" if near and near != pattern else "."
            raise _Missing(f"no recurrent module is named {pattern!r}{hint} There are: {listing(map(str, everywhere))}")
    covered = [one for one in everywhere if any(matches(pattern, one.name) for pattern in patterns)]
    return list({id(one.module): one for one in reversed(covered)}.values())[::-1]


@dataclass(frozen=True)
class _Choice:
    """One selecting field of a target: what it wants, and what a candidate has there."""

    field: str
    wanted: Sequence[Any] | None
    of: Callable[[Any], Iterable[Any]]

    def keep(self, candidates: list[tuple[Recurrent, Any]]) -> list[tuple[Recurrent, Any]]:
        """The candidates with any of the wanted. Raises _Missing for a wanted value that none of them has."""
        if self.wanted is None:
            return candidates
        there = list(dict.fromkeys(value for _, one in candidates for value in self.of(one)))
        for value in self.wanted:
            if value not in there:
                near = nearest(str(value), map(str, there)) if isinstance(value, str) else None
                hint = f"; did you mean {near!r}?" if near else "."
                where = listing(map(str, {id(r.module): r for r, _ in candidates}.values()))
                there_is = listing(map(str, there))
                raise _Missing(f"there is no {self.field} {value!r} in {where}{hint} There: {there_is}")
        return [(r, one) for r, one in candidates if set(self.wanted) & set(self.of(one))]


def _weights(target: Target, kind: Penalty | Constraint, modules: list[Recurrent]) -> tuple[WeightSite, ...]:
    wanted = target.role
    if wanted and set(wanted) & set(OUTPUT_ROLES):
        raise _Unbound(f"{kind.kind} acts on weights, not on the {listing(sorted(set(wanted) & set(OUTPUT_ROLES)))}")
    if target.bias == "effective" and wanted and "bias" not in wanted:
        raise _Unbound('"bias": "effective" says how biases are read, but the target has no role bias')
    if target.gate and kind.layout == "cell":
        raise _Unbound(f"{kind.kind} per cell takes all gates of a hidden unit together; leave out the gate")
    candidates = [(r, w) for r in modules for w in r.adapter.weights(r.module) if _is_read(w, target)]
    for choice in (
        _Choice("role", wanted, lambda w: (w.role,)),
        _Choice("layer", target.layer, lambda w: (w.layer,)),
        _Choice("direction", target.direction, lambda w: (w.direction,)),
        _Choice("gate", target.gate, lambda w: w.gates),
    ):
        candidates = choice.keep(candidates)
    candidates = _of_fitting_rank(kind, candidates, wanted)
    sites = [site for r, w in candidates for site in _blocks(r, w, target, kind.layout)]
    return _once(sites, {id(r.module): r for r, _ in candidates}.values())


def _is_read(weight: Weight, target: Target) -> bool:
    """Biases come one by one and, where their sum acts, once more as a pair: the target reads one form of them."""
    return weight.role != "bias" or (len(weight.parameters) > 1) == (target.bias == "effective")


def _of_fitting_rank(
    kind: Penalty | Constraint, candidates: list[tuple[Recurrent, Weight]], wanted: Sequence[str] | None
) -> list[tuple[Recurrent, Weight]]:
    fitting = [(r, w) for r, w in candidates if _parameter(r, w.parameters[0]).dim() in kind.ranks]
    unfit = sorted({w.role for _, w in candidates} - {w.role for _, w in fitting})
    if wanted and unfit:
        raise _Unbound(f"{kind.kind} is not defined for the {listing(unfit)}: it takes {_ranks(kind)}")
    if not fitting:
        raise _Missing(f"no weight is left that {kind.kind} is defined for: it takes {_ranks(kind)}")
    return fitting


def _ranks(kind: Penalty | Constraint) -> str:
    names = {1: "vectors", 2: "matrices"}
    return " and ".join(names.get(rank, f"{rank}-dimensional weights") for rank in kind.ranks)


def _parameter(recurrent: Recurrent, name: str) -> nn.Parameter:
    """The parameter of this name, as a plain, real one. Raises _Unbound where it is something else."""
    parameter = recurrent.module._parameters.get(name)
    where = f"{recurrent.name}.{name}".lstrip(".")
    if parameter is None:
        made = (
            "is computed from another (parametrized, pruned or wrapped)"
            if hasattr(recurrent.module, name)
            else "is missing"
        )
        raise _Unbound(f"{where} {made}; regkit acts on plain parameters")
    if nn.parameter.is_lazy(parameter) or parameter.is_meta:
        raise _Unbound(f"{where} has no memory yet (lazy or meta); attach once it is real")
    if not parameter.is_floating_point():
        raise _Unbound(f"{where} holds {parameter.dtype}, not floating-point numbers")
    return parameter


def _blocks(recurrent: Recurrent, weight: Weight, target: Target, layout: Layout) -> Iterator[WeightSite]:
    """The sites of one weight: whole, or one for each gate where the target or the kind tells gates apart."""
    parameters = [_parameter(recurrent, name) for name in weight.parameters]
    shape = tuple(parameters[0].shape)
    gates = len(weight.gates) or 1
    hidden = shape[0] // gates
    whole = WeightSite(
        recurrent.path, recurrent.name, type(recurrent.module).__name__, weight.parameters, weight.role,
        weight.layer, weight.direction, None, 0, shape[0], gates, shape,
    )  # fmt: skip
    apart = bool(target.gate) or layout == "gate"
    if apart and weight.gates:
        for index, gate in enumerate(weight.gates):
            if target.gate is None or gate in target.gate:
                _refuse_separate(recurrent, weight, (gate,))
                yield replace(whole, gate=gate, start=index * hidden, rows=hidden, gates=1, shape=(hidden, *shape[1:]))
    else:
        _refuse_separate(recurrent, weight, weight.separate)
        yield whole


def _refuse_separate(recurrent: Recurrent, weight: Weight, gates: tuple[str, ...]) -> None:
    apart = [gate for gate in gates if gate in weight.separate]
    if apart:
        together = [gate for gate in weight.gates if gate not in weight.separate]
        raise _Unbound(
            f"the biases of {recurrent} have no effective sum in the gate {listing(apart)}, where each acts alone; "
            f'use "bias": "each", or name the gates {listing(together)}'
        )


def _once(sites: list[WeightSite], recurrents: Iterable[Recurrent]) -> tuple[WeightSite, ...]:
    """The sites without those that are another's tied weight: one tensor counts once in a rule."""
    modules = {r.path: r.module for r in recurrents}
    seen: dict[tuple[Any, ...], WeightSite] = {}
    for site in sites:
        tensors: list[Tensor | None] = [modules[site.path]._parameters[name] for name in site.parameters]
        seen.setdefault((*map(id, tensors), site.start, site.rows), site)
    return tuple(seen.values())


def _outputs(target: Target, kind: ActivityPenalty, modules: list[Recurrent]) -> tuple[OutputSite, ...]:
    if target.gate:
        raise _Unbound(f"{kind.kind} acts on outputs, which have no gates")
    if target.bias != "each":
        raise _Unbound(f"{kind.kind} acts on outputs, which have no bias")
    roles = target.role or ("output",)
    if unfit := [role for role in roles if role not in OUTPUT_ROLES]:
        raise _Unbound(f"{kind.kind} acts on outputs, not on the {listing(unfit)}; roles are: {listing(OUTPUT_ROLES)}")
    candidates = [(r, o) for r in modules for o in r.adapter.outputs(r.module)]
    candidates = _Choice("role", roles, lambda o: (o.role,)).keep(candidates)
    if kind.sequence and (still := sorted({o.role for _, o in candidates if not o.sequence})):
        raise _Unbound(f"{kind.kind} compares neighbours in time; the role {listing(still)} has none")
    for choice in (
        _Choice("layer with a visible sequence or state", target.layer, lambda o: o.layers),
        _Choice("direction", target.direction, lambda o: o.directions),
    ):
        candidates = choice.keep(candidates)
    return tuple(
        OutputSite(r.path, r.name, type(r.module).__name__, o.role, layer, direction)
        for r, o in candidates
        for layer in _selected(target.layer, o.layers)
        for direction in _selected(target.direction, o.directions)
    )


def _selected(wanted: Sequence[Any] | None, there: Sequence[Any]) -> Sequence[Any]:
    """The wanted ones that are there; all of them together, as None, where that leaves nothing out."""
    kept = [value for value in there if wanted is None or value in wanted]
    return [None] if len(kept) == len(there) else kept
