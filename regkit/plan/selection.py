"""The selection of a rule's sites: the target narrows the candidates of a model, or does not fit."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Generic, TypeVar

from regkit.adapters import OUTPUT_ROLES, OutputSite, WeightSite
from regkit.document.spec import Rule
from regkit.document.target import Target
from regkit.errors import AttachError, PluginError, hint, hints_left, listing
from regkit.kinds import ActivityPenalty, Constraint, Layout, Penalty, Schedule, Via
from regkit.plan.binding import Binding
from regkit.plan.candidates import Candidates, ModuleCandidate, OutputCandidate, WeightCandidate
from regkit.vocabulary import missing_gate


class DoesNotFit(Exception):  # noqa: N818  # a signal within `plan`; users see ResolveError
    """The reason why a rule does not fit a model."""


def bind(key: str, rule: Rule, model: Candidates) -> Binding:
    """Bind one rule to the recurrent modules of a model. Raises DoesNotFit where there is no site for the rule."""
    kind = rule.kind
    assert isinstance(kind, (Penalty, ActivityPenalty, Constraint))  # the spec's fields hold no other family
    via: Via = rule.via or ("loss" if isinstance(kind, ActivityPenalty) else "gradient")
    schedule = rule.schedule if isinstance(rule.schedule, Schedule) else None
    binding = Binding(key, kind, schedule, via, rule.every, rule.optional)
    absent = _Absent(rule.optional)
    modules = _modules(rule.target, model, absent)
    if isinstance(kind, ActivityPenalty):
        binding = replace(binding, outputs=_outputs(rule.target, kind, modules, model, absent))
    else:
        weights = _weights(rule.target, kind, modules, model, absent)
        frozen = tuple(site for site, at in weights.items() if at.outline.frozen)
        binding = replace(
            binding, weights=tuple(weights), frozen=frozen, uncovered=_uncovered(rule.target, kind, modules)
        )
    return replace(binding, absent=tuple(absent.items))


@dataclass
class _Absent:
    """The items that a target asks for and a model lacks.

    optional: whether a rule may ask in vain; then `items` names each thing that is not there.
    """

    optional: bool
    items: list[str] = field(default_factory=list)

    def tell(self, items: Iterable[str], sentence: Callable[[], str]) -> None:
        """Take note of items. Raises DoesNotFit where the rule is not optional; only then is the sentence made."""
        if not self.optional:
            raise DoesNotFit(sentence() if hints_left() else f"there is no {listing(items)}")
        self.items += (item for item in items if item not in self.items)


def _modules(target: Target, model: Candidates, absent: _Absent) -> list[ModuleCandidate]:
    """The modules that the target's patterns cover; every pattern must cover one."""
    patterns = target.module or ("**",)
    for pattern in patterns:
        if not model.covers(pattern):
            absent.tell([f"module {pattern!r}"], partial(model.unmatched, pattern))
    return model.chosen(patterns)


P = TypeVar("P", WeightCandidate, OutputCandidate)


@dataclass(frozen=True)
class _Choice(Generic[P]):
    """One selecting field of a target: the wanted values, and a function that gives the values of a candidate."""

    field: str
    wanted: Sequence[Any] | None
    values_of: Callable[[P], Iterable[Any]]

    def _available(self, candidates: list[P]) -> list[Any]:
        return list(dict.fromkeys(value for candidate in candidates for value in self.values_of(candidate)))

    def keep(self, candidates: list[P], absent: _Absent) -> list[P]:
        """The candidates with any of the wanted values. Tells of wanted values that no candidate has."""
        if self.wanted is None:
            return candidates
        available = self._available(candidates)
        for value in self.wanted:
            if value not in available:
                absent.tell([f"{self.field} {value!r}"], partial(self._absent, value, available, candidates))
        wanted = set(self.wanted)
        return [candidate for candidate in candidates if not wanted.isdisjoint(self.values_of(candidate))]

    def _absent(self, value: Any, available: list[Any], candidates: list[P]) -> str:
        reasons = (missing_gate(one.recurrent.module_class, value) for one in candidates if self.field == "gate")
        near = hint(value, available, place=self.field, foreign=next(filter(None, reasons), None))
        where = listing(str(candidate.recurrent) for candidate in candidates) + near
        return f"there is no {self.field} {value!r} in {where} Available: {listing(map(str, available))}"

    def ruled_out(self, candidates: list[P]) -> list[str]:
        """The wanted values that no candidate has any more, because another choice excludes all that had."""
        if self.wanted is None:
            return []
        available = self._available(candidates)
        return [f"{self.field} {value!r}" for value in self.wanted if value not in available]


def _select(
    target: Target, model: Candidates, candidates: list[P], choices: list[_Choice[P]], absent: _Absent
) -> list[P]:
    """The candidates that every choice keeps. Each item of each list, and each pattern, must keep one."""
    for choice in choices:
        candidates = choice.keep(candidates, absent)
    modules = {id(candidate.recurrent.module) for candidate in candidates}
    out = [f"module {pattern!r}" for pattern in target.module or () if not model.has(pattern, modules)]
    out += [item for choice in choices for item in choice.ruled_out(candidates)]
    if out:
        absent.tell(out, partial(_excluded, out, choices))
    return candidates


def _excluded(out: list[str], choices: list[_Choice[P]]) -> str:
    asked = [f"{choice.field} {', '.join(map(str, choice.wanted))}" for choice in choices if choice.wanted]
    return f"nothing here has {listing(out)} together with the rest of the target: {'; '.join(asked)}"


def _weights(
    target: Target, kind: Penalty | Constraint, modules: list[ModuleCandidate], model: Candidates, absent: _Absent
) -> dict[WeightSite, WeightCandidate]:
    """The sites of a rule on weights, each with the weight of which the site is a part."""
    wanted = target.role
    put_out = {o.output.role for m in modules for o in m.outputs} | set(OUTPUT_ROLES)
    if unfit := [role for role in wanted or () if role in put_out]:
        raise DoesNotFit(f"{kind.kind} acts on weights, not on the {listing(unfit)}")
    if target.bias == "effective" and wanted and "bias" not in wanted:
        raise DoesNotFit('"bias": "effective" says how biases are read, but the target has no role bias')
    if target.gate and kind.layout == "cell":
        raise DoesNotFit(f"{kind.kind} per cell takes all gates of a hidden unit together; leave out the gate")
    choices: list[_Choice[WeightCandidate]] = [
        _Choice("role", wanted, lambda w: (w.weight.role,)),
        _Choice("layer", target.layer, lambda w: (w.weight.layer,)),
        _Choice("direction", target.direction, lambda w: (w.weight.direction,)),
        _Choice("gate", target.gate, lambda w: w.weight.gates),
    ]
    candidates = [w for m in modules for w in (m.each if target.bias == "each" else m.effective)]
    candidates = _of_fitting_rank(kind, _select(target, model, candidates, choices, absent), wanted, absent)
    if kind.layout == "cell":
        _refuse_scattered(kind, candidates)
    sites: dict[Hashable, tuple[WeightSite, WeightCandidate]] = {}
    for weight in candidates:
        for gate in _gates(weight, target, kind.layout):
            site = weight.site(gate)
            sites.setdefault(weight.part(site), (site, weight))  # a tied weight counts once in a rule
    return _fitting(kind, dict(sites.values()), absent)


def _fitting(
    kind: Penalty | Constraint, sites: dict[WeightSite, WeightCandidate], absent: _Absent
) -> dict[WeightSite, WeightCandidate]:
    """The sites of shapes that the kind is for. Tells of the others."""
    reasons = {site: _unfit(kind, site) for site in sites}
    for site, reason in reasons.items():
        if reason is not None:
            place = f"{site.name}.{site.parameter}, {' × '.join(map(str, site.shape))}: {reason}".lstrip(".")
            absent.tell([place], partial(str, f"{kind.kind} is not for {place}"))
    return {site: at for site, at in sites.items() if reasons[site] is None}


def _unfit(kind: Penalty | Constraint, site: WeightSite) -> str | None:
    """The reason that a kind gives for not taking the weight of a site; None where the kind takes the weight."""
    rows, *others = site.shape
    shape = (site.gates, rows // site.gates, *others) if kind.layout == "cell" else site.shape
    try:
        return kind.fits(shape)
    except Exception as error:  # a stranger's code: anything can come out
        raise PluginError(f"{kind.describe()} cannot tell whether it fits a weight {shape}: {error!r}") from error


def _uncovered(
    target: Target, kind: Penalty | Constraint, modules: list[ModuleCandidate]
) -> tuple[tuple[str, str], ...]:
    """The parameters of the modules that no role covers. Raises DoesNotFit where a rule on every weight omits one."""
    found = [(one.recurrent.name, name) for one in modules for name in one.uncovered]
    names, ignored = list(dict.fromkeys(name for _, name in found)), target.ignore or ()
    for pattern in ignored:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise DoesNotFit(
                f"ignore names {pattern!r}, and there is no such parameter beside the weights of the roles"
                f"{hint(pattern, names)} Available: {listing(names)}"
            )
    left = [f"{at}.{name}".lstrip(".") for at, name in found if not any(fnmatchcase(name, one) for one in ignored)]
    if left and target.role is None:
        raise DoesNotFit(
            f"{kind.kind} without a role is to act on every weight, and would leave out {listing(left)}, which no "
            'adapter describes: name the roles that are meant, or leave it out by name in the target\'s "ignore", or '
            "describe it in an adapter"
        )
    return tuple(found)


def _of_fitting_rank(
    kind: Penalty | Constraint, candidates: list[WeightCandidate], wanted: Sequence[str] | None, absent: _Absent
) -> list[WeightCandidate]:
    """The candidates that the kind is defined for, without biases for a constraint on a target without roles."""
    spared = ("bias",) if isinstance(kind, Constraint) and not wanted else ()
    candidates = [w for w in candidates if w.weight.role not in spared]
    ranks = kind.ranks
    fitting = [w for w in candidates if len(_shape(w)) in ranks]
    unfit = sorted({w.weight.role for w in candidates} - {w.weight.role for w in fitting})
    if wanted and unfit:
        raise DoesNotFit(f"{kind.kind} is not defined for the {listing(unfit)}: it takes {_ranks(kind)}")
    if not fitting and not absent.items:
        absent.tell(["weights"], lambda: f"no weight is left that {kind.kind} is defined for: it takes {_ranks(kind)}")
    return fitting


def _shape(candidate: WeightCandidate) -> tuple[int, ...]:
    """The shape of a weight that kinds see. Raises DoesNotFit where the weight cannot be followed."""
    try:
        return candidate.outline.shape
    except AttachError as error:
        raise DoesNotFit(f"{candidate.recurrent}: {error}") from None


def _refuse_scattered(kind: Penalty | Constraint, candidates: list[WeightCandidate]) -> None:
    """Raise DoesNotFit where the gates of one hidden unit are in several weights: no block holds all of a unit."""
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


def _gates(candidate: WeightCandidate, target: Target, layout: Layout) -> Iterator[str | None]:
    """The gates to take one by one, where the target or the kind tells gates apart; else None, for the whole weight."""
    weight = candidate.weight
    if (target.gate or layout == "gate") and weight.gates:
        for gate in weight.gates:
            if target.gate is None or gate in target.gate:
                _refuse_separate(candidate, (gate,))
                yield gate
    else:
        _refuse_separate(candidate, weight.separate)
        yield None


def _refuse_separate(candidate: WeightCandidate, gates: tuple[str, ...]) -> None:
    weight = candidate.weight
    if apart := [gate for gate in gates if gate in weight.separate]:
        together = [gate for gate in weight.gates if gate not in weight.separate]
        raise DoesNotFit(
            f"the biases of {candidate.recurrent} have no effective sum in the gate {listing(apart)}, where each acts "
            f'alone; use "bias": "each", or name the gates {listing(together)}'
        )


def _outputs(
    target: Target, kind: ActivityPenalty, modules: list[ModuleCandidate], model: Candidates, absent: _Absent
) -> tuple[OutputSite, ...]:
    if target.gate:
        raise DoesNotFit(f"{kind.kind} acts on outputs, which have no gates")
    if target.bias != "each":
        raise DoesNotFit(f"{kind.kind} acts on outputs, which have no bias")
    roles = target.role or ("output",)
    everything = [o for m in modules for o in m.outputs]
    put_out = dict.fromkeys([*OUTPUT_ROLES, *(o.output.role for o in everything)])
    if unfit := [role for role in roles if role not in put_out]:
        wrong, known = listing(unfit), listing(put_out)
        raise DoesNotFit(f"{kind.kind} acts on outputs, not on the {wrong}; available roles: {known}")
    by_role = _Choice[OutputCandidate]("role", roles, lambda o: (o.output.role,))
    chosen = by_role.keep(everything, absent)
    if kind.sequence and (still := {o.output.role: None for o in chosen if not o.output.sequence}):
        raise DoesNotFit(f"{kind.kind} compares neighbours in time; the role {listing(still)} has none")
    choices: list[_Choice[OutputCandidate]] = [
        by_role,
        # Of a stacked module only the top layer's sequence is an output; the other layers stay inside.
        _Choice("visible layer", target.layer, lambda o: o.output.layers),
        _Choice("direction", target.direction, lambda o: o.output.directions),
    ]
    candidates = _select(target, model, everything, choices, absent)
    return tuple(one.site(target.layer, target.direction) for one in candidates)
