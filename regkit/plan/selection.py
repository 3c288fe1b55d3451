"""Selecting the places that a rule acts on: from its target to the sites of a model, or to why there are none."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, Generic, TypeVar

from regkit.adapters import OUTPUT_ROLES, OutputSite, WeightSite
from regkit.document.spec import Rule
from regkit.document.target import Target
from regkit.errors import AttachError, listing, nearest
from regkit.kinds import ActivityPenalty, Constraint, Layout, Penalty, Schedule, Via
from regkit.plan.binding import Binding
from regkit.plan.candidates import Candidates, ModuleCandidate, OutputCandidate, WeightCandidate

# Of a stacked module only the top layer's sequence comes out; the others stay inside.
_VISIBLE: Final = "visible layer"


class DoesNotFit(Exception):  # noqa: N818  # a signal within this room; what users see is ResolveError
    """Why a rule does not fit."""


def bind(key: str, rule: Rule, everywhere: Candidates) -> Binding:
    """Bind one rule to the recurrent modules of a model. Raises Unbound where it does not fit."""
    kind = rule.kind
    assert isinstance(kind, (Penalty, ActivityPenalty, Constraint))  # the spec's fields hold no other family
    via: Via = rule.via or ("loss" if isinstance(kind, ActivityPenalty) else "gradient")
    schedule = rule.schedule if isinstance(rule.schedule, Schedule) else None
    binding = Binding(key, kind, schedule, via, rule.every, rule.optional)
    try:
        modules = _modules(rule.target, everywhere)
        if isinstance(kind, ActivityPenalty):
            return replace(binding, outputs=_outputs(rule.target, kind, modules, everywhere))
        return replace(binding, weights=_weights(rule.target, kind, modules, everywhere))
    except _Missing:
        if rule.optional:
            return binding
        raise


class _Missing(DoesNotFit):
    """The rule asks for something that the model does not have; an optional rule may, so its sentence is made late."""

    def __init__(self, sentence: Callable[[], str]) -> None:
        self._sentence = sentence

    def __str__(self) -> str:
        return self._sentence()


def _modules(target: Target, everywhere: Candidates) -> list[ModuleCandidate]:
    """The modules that the target's patterns cover; every pattern must cover one."""
    patterns = target.module or ("**",)
    for pattern in patterns:
        if not everywhere.covers(pattern):
            raise _Missing(partial(_unnamed, pattern, everywhere))
    return everywhere.chosen(patterns)


def _unnamed(pattern: str, everywhere: Candidates) -> str:
    recurrents = everywhere.modules
    near = nearest(pattern, [one.name for one in recurrents if one.name])
    hint = f"; did you mean {near!r}?" if near and near != pattern else "."
    return f"no recurrent module is named {pattern!r}{hint} Available: {listing(map(str, recurrents))}"


P = TypeVar("P", WeightCandidate, OutputCandidate)


@dataclass(frozen=True)
class _Choice(Generic[P]):
    """One selecting field of a target: what it wants, and what a candidate has there."""

    field: str
    wanted: Sequence[Any] | None
    of: Callable[[P], Iterable[Any]]

    def _there(self, candidates: list[P]) -> list[Any]:
        return list(dict.fromkeys(value for candidate in candidates for value in self.of(candidate)))

    def keep(self, candidates: list[P]) -> list[P]:
        """The candidates with any of the wanted. Raises _Missing for a wanted value that none of them has."""
        if self.wanted is None:
            return candidates
        there = self._there(candidates)
        for value in self.wanted:
            if value not in there:
                raise _Missing(partial(self._absent, value, there, candidates))
        wanted = set(self.wanted)
        return [candidate for candidate in candidates if not wanted.isdisjoint(self.of(candidate))]

    def _absent(self, value: Any, there: list[Any], candidates: list[P]) -> str:
        near = nearest(value, there) if isinstance(value, str) else None
        hint = f"; did you mean {near!r}?" if near else "."
        where = listing(str(candidate.recurrent) for candidate in candidates)
        return f"there is no {self.field} {value!r} in {where}{hint} Available: {listing(map(str, there))}"

    def ruled_out(self, candidates: list[P]) -> list[str]:
        """What of the wanted is left out of the candidates, because another choice excludes it."""
        if self.wanted is None:
            return []
        there = self._there(candidates)
        return [f"{self.field} {value!r}" for value in self.wanted if value not in there]


def _select(target: Target, everywhere: Candidates, candidates: list[P], choices: list[_Choice[P]]) -> list[P]:
    """The candidates that every choice keeps. Each item of each list, and each pattern, must keep one."""
    for choice in choices:
        candidates = choice.keep(candidates)
    modules = {id(candidate.recurrent.module) for candidate in candidates}
    out = [f"module {pattern!r}" for pattern in target.module or () if not everywhere.has(pattern, modules)]
    out += [item for choice in choices for item in choice.ruled_out(candidates)]
    if out:
        raise _Missing(partial(_together, out, choices))
    return candidates


def _together(out: list[str], choices: list[_Choice[P]]) -> str:
    asked = [f"{choice.field} {', '.join(map(str, choice.wanted))}" for choice in choices if choice.wanted]
    return f"nothing here has {listing(out)} together with the rest of the target: {'; '.join(asked)}"


def _weights(
    target: Target, kind: Penalty | Constraint, modules: list[ModuleCandidate], everywhere: Candidates
) -> tuple[WeightSite, ...]:
    wanted = target.role
    put_out = {o.output.role for r in modules for o in r.outputs} | set(OUTPUT_ROLES)
    if unfit := [role for role in wanted or () if role in put_out]:
        raise DoesNotFit(f"{kind.kind} acts on weights, not on the {listing(unfit)}")
    if target.bias == "effective" and wanted and "bias" not in wanted:
        raise DoesNotFit('"bias": "effective" says how biases are read, but the target has no role bias')
    if target.gate and kind.layout == "cell":
        raise DoesNotFit(f"{kind.kind} per cell takes all gates of a hidden unit together; leave out the gate")
    candidates = _select(
        target,
        everywhere,
        [w for r in modules for w in (r.each if target.bias == "each" else r.effective)],
        [
            _Choice("role", wanted, lambda w: (w.weight.role,)),
            _Choice("layer", target.layer, lambda w: (w.weight.layer,)),
            _Choice("direction", target.direction, lambda w: (w.weight.direction,)),
            _Choice("gate", target.gate, lambda w: w.weight.gates),
        ],
    )
    candidates = _of_fitting_rank(kind, candidates, wanted)
    if kind.layout == "cell":
        _refuse_scattered(kind, candidates)
    sites: dict[Hashable, WeightSite] = {}
    for weight in candidates:
        for gate in _gates(weight, target, kind.layout):
            site = weight.site(gate)
            sites.setdefault(weight.part(site), site)  # a tied weight counts once in a rule
    return tuple(sites.values())


def _of_fitting_rank(
    kind: Penalty | Constraint, candidates: list[WeightCandidate], wanted: Sequence[str] | None
) -> list[WeightCandidate]:
    """The candidates that the kind is defined for. A constraint takes biases only where the target names them."""
    spared = ("bias",) if isinstance(kind, Constraint) and not wanted else ()
    candidates = [w for w in candidates if w.weight.role not in spared]
    ranks = kind.ranks
    fitting = [w for w in candidates if len(_shape(w)) in ranks]
    unfit = sorted({w.weight.role for w in candidates} - {w.weight.role for w in fitting})
    if wanted and unfit:
        raise DoesNotFit(f"{kind.kind} is not defined for the {listing(unfit)}: it takes {_ranks(kind)}")
    if not fitting:
        raise _Missing(lambda: f"no weight is left that {kind.kind} is defined for: it takes {_ranks(kind)}")
    return fitting


def _shape(place: WeightCandidate) -> tuple[int, ...]:
    """The shape that kinds see of it. Raises Unbound where it cannot be read and followed."""
    try:
        return place.outline.shape
    except AttachError as error:
        raise DoesNotFit(f"{place.recurrent}: {error}") from None


def _refuse_scattered(kind: Penalty | Constraint, candidates: list[WeightCandidate]) -> None:
    """Raise Unbound where the gates of one hidden unit are not in one weight: no block holds them together."""
    found: dict[tuple[Any, ...], tuple[str, ...]] = {}
    for recurrent, weight in ((one.recurrent, one.weight) for one in candidates):
        place = (id(recurrent.module), weight.role, weight.layer, weight.direction)
        if found.setdefault(place, weight.gates) != weight.gates:
            gates = listing([*found[place], *weight.gates])
            raise DoesNotFit(
                f"{kind.kind} per cell takes all gates of a hidden unit together, but {recurrent} keeps {gates} of the "
                f"{weight.role} in weights of their own"
            )


def _ranks(kind: Penalty | Constraint) -> str:
    names = {1: "vectors", 2: "matrices"}
    return " and ".join(names.get(rank, f"{rank}-dimensional weights") for rank in kind.ranks)


def _gates(place: WeightCandidate, target: Target, layout: Layout) -> Iterator[str | None]:
    """The gates that are taken one by one, where the target or the kind tells them apart; else none, for the whole."""
    weight = place.weight
    if (target.gate or layout == "gate") and weight.gates:
        for gate in weight.gates:
            if target.gate is None or gate in target.gate:
                _refuse_separate(place, (gate,))
                yield gate
    else:
        _refuse_separate(place, weight.separate)
        yield None


def _refuse_separate(place: WeightCandidate, gates: tuple[str, ...]) -> None:
    weight = place.weight
    if apart := [gate for gate in gates if gate in weight.separate]:
        together = [gate for gate in weight.gates if gate not in weight.separate]
        raise DoesNotFit(
            f"the biases of {place.recurrent} have no effective sum in the gate {listing(apart)}, where each acts "
            f'alone; use "bias": "each", or name the gates {listing(together)}'
        )


def _outputs(
    target: Target, kind: ActivityPenalty, modules: list[ModuleCandidate], everywhere: Candidates
) -> tuple[OutputSite, ...]:
    if target.gate:
        raise DoesNotFit(f"{kind.kind} acts on outputs, which have no gates")
    if target.bias != "each":
        raise DoesNotFit(f"{kind.kind} acts on outputs, which have no bias")
    roles = target.role or ("output",)
    everything = [o for r in modules for o in r.outputs]
    put_out = dict.fromkeys([*OUTPUT_ROLES, *(o.output.role for o in everything)])
    if unfit := [role for role in roles if role not in put_out]:
        wrong, known = listing(unfit), listing(put_out)
        raise DoesNotFit(f"{kind.kind} acts on outputs, not on the {wrong}; available roles: {known}")
    by_role = _Choice[OutputCandidate]("role", roles, lambda o: (o.output.role,))
    if kind.sequence and (still := {o.output.role: None for o in by_role.keep(everything) if not o.output.sequence}):
        raise DoesNotFit(f"{kind.kind} compares neighbours in time; the role {listing(still)} has none")
    candidates = _select(
        target,
        everywhere,
        everything,
        [
            by_role,
            _Choice(_VISIBLE, target.layer, lambda o: o.output.layers),
            _Choice("direction", target.direction, lambda o: o.output.directions),
        ],
    )
    return tuple(one.site(target.layer, target.direction) for one in candidates)
