"""Selecting the places that a rule acts on: from its target to the sites of a model, or to why there are none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from torch import Tensor

from regkit.binding import Binding
from regkit.declared import outline, outputs_of, weights_of
from regkit.errors import AttachError, listing, nearest
from regkit.kept import storage_of
from regkit.kinds import ActivityPenalty, Constraint, Layout, Penalty, Schedule, Via
from regkit.modules import Recurrent, class_name, matches
from regkit.sites import OUTPUT_ROLES, OutputSite, Weight, WeightSite
from regkit.spec import Rule
from regkit.target import Target

# Of a stacked module only the top layer's sequence comes out; the others stay inside.
_VISIBLE: Final = "visible layer"


class Unbound(Exception):  # noqa: N818  # a signal within this room; what users see is ResolveError
    """Why a rule does not fit."""


def bind(key: str, rule: Rule, everywhere: list[Recurrent]) -> Binding:
    """Bind one rule to the recurrent modules of a model. Raises Unbound where it does not fit."""
    kind = rule.kind
    assert isinstance(kind, (Penalty, ActivityPenalty, Constraint))  # the spec's fields hold no other family
    via: Via = rule.via or ("loss" if isinstance(kind, ActivityPenalty) else "gradient")
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


class _Missing(Unbound):
    """The rule asks for something that the model does not have; an optional rule may."""


def _modules(target: Target, everywhere: list[Recurrent]) -> list[Recurrent]:
    """The modules that the target's patterns cover; every pattern must cover one."""
    patterns = target.module or ("**",)
    for pattern in patterns:
        if not any(_covered(one, (pattern,)) for one in everywhere):
            near = nearest(pattern, [one.name for one in everywhere if one.name])
            hint = f"; did you mean {near!r}?" if near and near != pattern else "."
            raise _Missing(f"no recurrent module is named {pattern!r}{hint} Available: {listing(map(str, everywhere))}")
    covered = (_covered(one, patterns) for one in everywhere)
    return [one for one in covered if one is not None]


def _covered(recurrent: Recurrent, patterns: Sequence[str]) -> Recurrent | None:
    """The module under the first of its names that a pattern covers."""
    for path, name in recurrent.places:
        if any(matches(pattern, name) for pattern in patterns):
            return replace(recurrent, path=path, name=name)
    return None


Candidate = tuple[Recurrent, Any]  # a module, and one of its weights or outputs


@dataclass(frozen=True)
class _Choice:
    """One selecting field of a target: what it wants, and what a candidate has there."""

    field: str
    wanted: Sequence[Any] | None
    of: Callable[[Recurrent, Any], Iterable[Any]]

    def _there(self, candidates: list[Candidate]) -> list[Any]:
        return list(dict.fromkeys(value for candidate in candidates for value in self.of(*candidate)))

    def keep(self, candidates: list[Candidate]) -> list[Candidate]:
        """The candidates with any of the wanted. Raises _Missing for a wanted value that none of them has."""
        if self.wanted is None:
            return candidates
        there = self._there(candidates)
        for value in self.wanted:
            if value not in there:
                near = nearest(value, there) if isinstance(value, str) else None
                hint = f"; did you mean {near!r}?" if near else "."
                where = listing(str(recurrent) for recurrent, _ in candidates)
                there_is = listing(map(str, there))
                raise _Missing(f"there is no {self.field} {value!r} in {where}{hint} Available: {there_is}")
        return [candidate for candidate in candidates if set(self.wanted) & set(self.of(*candidate))]

    def ruled_out(self, candidates: list[Candidate]) -> Iterator[str]:
        """What of the wanted is left out of the candidates, because another choice excludes it."""
        there = self._there(candidates)
        return (f"{self.field} {value!r}" for value in self.wanted or () if value not in there)


def _select(target: Target, candidates: list[Candidate], choices: list[_Choice]) -> list[Candidate]:
    """The candidates that every choice keeps. Each item of each list, and each pattern, must keep one."""
    for choice in choices:
        candidates = choice.keep(candidates)
    patterns = target.module or ()
    covering = _Choice("module", patterns, lambda r, _: [one for one in patterns if _covered(r, (one,))])
    if out := [item for choice in (covering, *choices) for item in choice.ruled_out(candidates)]:
        asked = [f"{choice.field} {', '.join(map(str, choice.wanted))}" for choice in choices if choice.wanted]
        raise _Missing(f"nothing here has {listing(out)} together with the rest of the target: {'; '.join(asked)}")
    return candidates


def _weights(target: Target, kind: Penalty | Constraint, modules: list[Recurrent]) -> tuple[WeightSite, ...]:
    wanted = target.role
    put_out = {o.role for r in modules for o in outputs_of(r)} | set(OUTPUT_ROLES)
    if unfit := [role for role in wanted or () if role in put_out]:
        raise Unbound(f"{kind.kind} acts on weights, not on the {listing(unfit)}")
    if target.bias == "effective" and wanted and "bias" not in wanted:
        raise Unbound('"bias": "effective" says how biases are read, but the target has no role bias')
    if target.gate and kind.layout == "cell":
        raise Unbound(f"{kind.kind} per cell takes all gates of a hidden unit together; leave out the gate")
    candidates = _select(
        target,
        [(r, w) for r in modules for w in _read(weights_of(r), target)],
        [
            _Choice("role", wanted, lambda _, w: (w.role,)),
            _Choice("layer", target.layer, lambda _, w: (w.layer,)),
            _Choice("direction", target.direction, lambda _, w: (w.direction,)),
            _Choice("gate", target.gate, lambda _, w: w.gates),
        ],
    )
    candidates = _of_fitting_rank(kind, candidates, wanted)
    if kind.layout == "cell":
        _refuse_scattered(kind, candidates)
    sites = [site for r, w in candidates for site in _blocks(r, w, target, kind.layout)]
    return _once(sites, {id(r.module): r for r, _ in candidates}.values())


def _read(weights: Iterable[Weight], target: Target) -> list[Weight]:
    """The weights in the form in which the target reads biases: each on its own, or in a sum where there is one."""
    found = list(weights)
    summed = {name for weight in found if len(weight.parameters) > 1 for name in weight.parameters}
    if target.bias == "each":
        return [weight for weight in found if len(weight.parameters) == 1]
    return [weight for weight in found if len(weight.parameters) > 1 or weight.parameters[0] not in summed]


def _of_fitting_rank(
    kind: Penalty | Constraint, candidates: list[Candidate], wanted: Sequence[str] | None
) -> list[Candidate]:
    """The candidates that the kind is defined for. A constraint takes biases only where the target names them."""
    spared = ("bias",) if isinstance(kind, Constraint) and not wanted else ()
    candidates = [(r, w) for r, w in candidates if w.role not in spared]
    fitting = [(r, w) for r, w in candidates if _outline(r, w).dim() in kind.ranks]
    unfit = sorted({w.role for _, w in candidates} - {w.role for _, w in fitting})
    if wanted and unfit:
        raise Unbound(f"{kind.kind} is not defined for the {listing(unfit)}: it takes {_ranks(kind)}")
    if not fitting:
        raise _Missing(f"no weight is left that {kind.kind} is defined for: it takes {_ranks(kind)}")
    return fitting


def _refuse_scattered(kind: Penalty | Constraint, candidates: list[Candidate]) -> None:
    """Raise Unbound where the gates of one hidden unit are not in one weight: no block holds them together."""
    found: dict[tuple[Any, ...], tuple[str, ...]] = {}
    for recurrent, weight in candidates:
        place = (id(recurrent.module), weight.role, weight.layer, weight.direction)
        if found.setdefault(place, weight.gates) != weight.gates:
            gates = listing([*found[place], *weight.gates])
            raise Unbound(
                f"{kind.kind} per cell takes all gates of a hidden unit together, but {recurrent} keeps {gates} of the "
                f"{weight.role} in weights of their own"
            )


def _ranks(kind: Penalty | Constraint) -> str:
    names = {1: "vectors", 2: "matrices"}
    return " and ".join(names.get(rank, f"{rank}-dimensional weights") for rank in kind.ranks)


def _outline(recurrent: Recurrent, weight: Weight) -> Tensor:
    """A tensor of the shape that kinds see of it. Raises Unbound where it cannot be read and followed."""
    try:
        return outline(recurrent, weight)
    except AttachError as error:
        raise Unbound(f"{recurrent}: {error}") from None


def _blocks(recurrent: Recurrent, weight: Weight, target: Target, layout: Layout) -> Iterator[WeightSite]:
    """The sites of one weight: whole, or one for each gate where the target or the kind tells gates apart."""
    shape = tuple(_outline(recurrent, weight).shape)
    gates = len(weight.gates) or 1
    hidden = shape[0] // gates
    whole = WeightSite(
        recurrent.path, recurrent.name, class_name(recurrent.module), weight.parameters, weight.role,
        weight.layer, weight.direction, None, 0, shape[0], gates, shape,
        weight.transposed, weight.columns, weight.through, weight.mask,
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
        raise Unbound(
            f"the biases of {recurrent} have no effective sum in the gate {listing(apart)}, where each acts alone; "
            f'use "bias": "each", or name the gates {listing(together)}'
        )


def _once(sites: list[WeightSite], recurrents: Iterable[Recurrent]) -> tuple[WeightSite, ...]:
    """The sites without those that are another's tied weight: one tensor counts once in a rule."""
    by_path = {r.path: r for r in recurrents}
    seen: dict[tuple[Any, ...], WeightSite] = {}
    for site in sites:
        at = by_path[site.path]
        kept = [storage_of(at.module, at.parent, name, site.through, site.mask) for name in site.parameters]
        seen.setdefault((*(one for storage in kept for one in storage.identity), site.part), site)
    return tuple(seen.values())


def _outputs(target: Target, kind: ActivityPenalty, modules: list[Recurrent]) -> tuple[OutputSite, ...]:
    if target.gate:
        raise Unbound(f"{kind.kind} acts on outputs, which have no gates")
    if target.bias != "each":
        raise Unbound(f"{kind.kind} acts on outputs, which have no bias")
    roles = target.role or ("output",)
    everything = [(r, o) for r in modules for o in outputs_of(r)]
    put_out = dict.fromkeys([*OUTPUT_ROLES, *(o.role for _, o in everything)])
    if unfit := [role for role in roles if role not in put_out]:
        raise Unbound(f"{kind.kind} acts on outputs, not on the {listing(unfit)}; available roles: {listing(put_out)}")
    by_role = _Choice("role", roles, lambda _, o: (o.role,))
    if kind.sequence and (still := {o.role: None for _, o in by_role.keep(everything) if not o.sequence}):
        raise Unbound(f"{kind.kind} compares neighbours in time; the role {listing(still)} has none")
    candidates = _select(
        target,
        everything,
        [
            by_role,
            _Choice(_VISIBLE, target.layer, lambda _, o: o.layers),
            _Choice("direction", target.direction, lambda _, o: o.directions),
        ],
    )
    return tuple(
        OutputSite(
            r.path,
            r.name,
            class_name(r.module),
            o.role,
            tuple(layer for layer in o.layers if layer in (target.layer or o.layers)),
            tuple(direction for direction in o.directions if direction in (target.direction or o.directions)),
        )
        for r, o in candidates
    )
