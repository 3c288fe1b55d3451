"""The README's rules on weights once more, as plain arithmetic: what weights come out of a step, without regkit.

An `Interpreter` reads the document's rules as JSON values. Around each step of a bare model it adds to the gradients
before the update, and moves the weights after it. All is computed in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tests.support.random.plain_kinds import factor, penalty_of, projected, shrunk, violation_of

Rule = dict[str, Any]
Groups = Sequence[dict[str, Any]]
"""Parameter groups, as optimizers have them."""

GATES = {"LSTM": ("input", "forget", "cell", "output"), "GRU": ("reset", "update", "new")}
ROLES = {"weight_ih": "kernel", "weight_hh": "recurrent", "weight_hr": "projection"}


class Place(NamedTuple):
    """Some rows of a weight of a module, all where rows is None; two names are two biases of which the sum acts.

    gates: how many gates are stacked in the rows.
    """

    module: nn.Module
    names: tuple[str, ...]
    rows: tuple[int, int] | None
    gates: int

    def of(self, weight: Tensor) -> Tensor:
        """The rows, of a whole weight."""
        return weight if self.rows is None else weight[slice(*self.rows)]


def gates_of(module: nn.Module) -> tuple[str, ...]:
    """The gates that are stacked in a recurrent module's rows. A parametrized one is of a class made from its own."""
    return next((gates for kind, gates in GATES.items() for one in type(module).__mro__ if kind in one.__name__), ())


def places(model: nn.ModuleList, rule: Rule) -> Iterator[Place]:
    """The places that a rule is about, in a list of torch's own recurrent modules."""
    target = rule["target"]
    for number, module in enumerate(model):
        if target.get("module", str(number)) != str(number):
            continue
        for suffix, layer, direction in _layers(module):
            if target.get("layer", layer) != layer or target.get("direction", direction) != direction:
                continue
            for role, names in _weights(module, suffix, target.get("bias") == "effective"):
                spared = role == "bias" and "constraint" in rule and "role" not in target
                if target.get("role", role) == role and not spared:
                    yield from _blocks(module, role, names, target.get("gate"))


def _layers(module: nn.Module) -> Iterator[tuple[str, int, str]]:
    if isinstance(module, nn.RNNCellBase):
        yield "", 0, "forward"
        return
    for layer in range(module.num_layers):
        yield f"_l{layer}", layer, "forward"
        if module.bidirectional:
            yield f"_l{layer}_reverse", layer, "backward"


def _weights(module: nn.Module, suffix: str, effective: bool) -> Iterator[tuple[str, tuple[str, ...]]]:
    for name, role in ROLES.items():
        if name != "weight_hr" or getattr(module, "proj_size", 0):
            yield role, (name + suffix,)
    pair = f"bias_ih{suffix}", f"bias_hh{suffix}"
    yield from [("bias", pair)] if effective else [("bias", (name,)) for name in pair]


def _blocks(module: nn.Module, role: str, names: tuple[str, ...], gate: str | None) -> Iterator[Place]:
    gates = gates_of(module)
    if gate is None:
        yield Place(module, names, None, 1 if role == "projection" else max(len(gates), 1))
    elif gate in gates and role != "projection":
        start = gates.index(gate) * module.hidden_size
        yield Place(module, names, (start, start + module.hidden_size), 1)


# --- how a module keeps a weight -------------------------------------------------------------------------------------


def made_of(module: nn.Module, name: str) -> tuple[list[Tensor], list[Any]]:
    """The tensors that a weight is computed from, and what computes it: nothing, where it is a parameter itself."""
    if parametrize.is_parametrized(module, name):
        steps = module.parametrizations[name]
        count = 1 if steps.is_tensor else steps.ntensors
        return [getattr(steps, "original" if steps.is_tensor else f"original{i}") for i in range(count)], [*steps]
    if f"{name}_orig" in module._parameters:
        return [module._parameters[f"{name}_orig"]], [module._buffers[f"{name}_mask"]]
    return [module._parameters[name]], []


def acting(module: nn.Module, name: str) -> Tensor:
    """The whole weight that acts, in float64; autograd leads to what it is made of."""
    kept, by = made_of(module, name)
    if parametrize.is_parametrized(module, name):
        return getattr(module, name).double()
    return (kept[0] * by[0] if by else kept[0]).double()


def weight_at(place: Place) -> Tensor:
    """The weight that acts in a place: the one, or the sum of two."""
    return sum(place.of(acting(place.module, name)) for name in place.names)


def put(place: Place, name: str, block: Tensor) -> None:
    """Make a weight equal to a block in the rows of a place; where that is what it is already, nothing is written."""
    kept, by = made_of(place.module, name)
    now = acting(place.module, name).detach()
    wanted = now.clone()
    place.of(wanted).copy_(block)
    if parametrize.is_parametrized(place.module, name):
        value: Any = wanted.to(kept[0].dtype)
        if torch.equal(value, now.to(kept[0].dtype)):
            return
        for one in reversed(by):
            value = one.right_inverse(value)
        for original, new in zip(kept, [value] if isinstance(value, Tensor) else value, strict=True):
            if moved(original):
                original.copy_(new)
    else:
        kept[0].copy_(torch.where(by[0].bool(), wanted, kept[0].double()) if by else wanted)


def moved(parameter: Tensor) -> bool:
    """Whether torch's optimizers move a parameter, which is to say whether it has a gradient, or gets one."""
    return parameter.requires_grad or parameter.grad is not None


def leaves_of(place: Place) -> list[Tensor]:
    return [one for name in place.names for one in made_of(place.module, name)[0]]


# --- what rules do ---------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """A step that goes on: its number, and the group of each parameter that it trains."""

    index: int
    begins: bool
    groups: dict[Tensor, dict[str, Any]]

    def trained(self, place: Place) -> list[str]:
        """The names of a place's weights of which any part is trained."""
        return [name for name in place.names if any(one in self.groups for one in made_of(place.module, name)[0])]

    def rate(self, place: Place, names: Sequence[str]) -> float:
        """The learning rate of weights of a place."""
        leaves = (leaf for name in names for leaf in made_of(place.module, name)[0])
        return next(self.groups[leaf]["lr"] for leaf in leaves if leaf in self.groups)


class Interpreter:
    """The rules of a document on a bare model. count: the steps so far, of which several optimizers may share one."""

    def __init__(self, model: nn.ModuleList, rules: list[Rule]) -> None:
        self.model, self.rules, self.count = model, rules, 0
        self._places = [list(places(model, rule)) for rule in rules]
        self._stepped: set[Tensor] = set()
        self._due: list[set[Place]] = [set() for _ in rules]

    def _distinct(self, number: int) -> list[Place]:
        """The places of a rule; those that are computed alike from the same parameters are one."""
        found: dict[Any, Place] = {}
        for place in self._places[number]:
            parts = [part for name in place.names for some in made_of(place.module, name) for part in some]
            found.setdefault((*map(id, parts), place.rows), place)
        return list(found.values())

    def _via(self, via: str, step: Step) -> Iterator[tuple[dict[str, Any], Place, float]]:
        """Each penalty of a way, and each of its places that is trained, with the factor of its schedule."""
        for number, rule in enumerate(self.rules):
            if "penalty" in rule and rule.get("via", "gradient") == via:
                for place in self._distinct(number):
                    if step.trained(place):
                        yield rule["penalty"], place, factor(rule, step.index)

    def before(self, groups: Groups) -> Step | None:
        """Begin a step of these parameter groups: add to their gradients, then decay. None where no rule is met."""
        ruled = {
            leaf for number in range(len(self.rules)) for place in self._places[number] for leaf in leaves_of(place)
        }
        owned = {p: group for group in groups for p in group["params"] if p in ruled}
        if not owned:
            return None
        if self._stepped.isdisjoint(ruled):  # all that was stepped has been replaced
            self._stepped = set()
        joins = bool(self._stepped) and self._stepped.isdisjoint(owned)
        self._stepped = self._stepped | set(owned) if joins else set(owned)
        trained = {p: group for p, group in owned.items() if p.grad is not None}
        step = Step(self.count - joins, not joins, trained)
        self.count += not joins
        self._add_gradients(step)
        with torch.no_grad():
            for penalty, place, scale in self._via("decoupled", step):
                with torch.enable_grad():
                    w = weight_at(place).detach().requires_grad_()
                    (slope,) = torch.autograd.grad(penalty_of(penalty, w), w)
                for name in step.trained(place):
                    block = place.of(acting(place.module, name))
                    put(place, name, block - step.rate(place, [name]) * scale * slope)
        return step

    def _add_gradients(self, step: Step) -> None:
        """Add what autograd says is the slope of the sum of all penalties; a penalty is made small in any case."""
        frozen = [leaf for leaf in step.groups if not leaf.requires_grad]
        for leaf in frozen:
            leaf.requires_grad_(True)
        terms = [scale * penalty_of(penalty, weight_at(place)) for penalty, place, scale in self._via("gradient", step)]
        if terms and step.groups:
            slopes = torch.autograd.grad(sum(terms), list(step.groups), allow_unused=True)
            for (leaf, group), slope in zip(step.groups.items(), slopes, strict=True):
                if slope is not None:
                    leaf.grad.add_(slope, alpha=-1 if group.get("maximize") else 1)
        for leaf in frozen:
            leaf.requires_grad_(False)

    @torch.no_grad()
    def after(self, step: Step | None) -> None:
        """End a step, once the weights are updated: proximal operators, then constraints in their order."""
        if step is None:
            return
        for penalty, place, scale in self._via("proximal", step):
            mine = step.trained(place)
            self._move(place, mine, shrunk(penalty, weight_at(place), step.rate(place, mine) * scale * len(mine)))
        for number, rule in enumerate(self.rules):
            if "constraint" in rule:
                self._constrain(number, rule, step)

    def _constrain(self, number: int, rule: Rule, step: Step) -> None:
        """Project after every N-th step what that trained, and what it did not train after the next that does."""
        now = (step.index + 1) % rule.get("every", 1) == 0
        if now and step.begins:
            self._due[number] = set(self._places[number])
        for place in self._distinct(number):
            mine = step.trained(place)
            if mine and (now or place in self._due[number]):
                self._move(place, mine, projected(rule, weight_at(place), step.index, place.gates))
                self._due[number].discard(place)

    def _move(self, place: Place, names: list[str], point: Tensor) -> None:
        """Bring the weight that acts to a point, each of these having an equal share in the way."""
        share = (point - weight_at(place)) / len(names)
        blocks = [place.of(acting(place.module, name)) + share if len(place.names) > 1 else point for name in names]
        for name, block in zip(names, blocks, strict=True):
            put(place, name, block)

    @torch.no_grad()
    def apply_constraints(self) -> None:
        """Project all that is not frozen."""
        for number, rule in enumerate(self.rules):
            for place in self._distinct(number) if "constraint" in rule else ():
                free = [name for name in place.names if any(moved(p) for p in made_of(place.module, name)[0])]
                if free:
                    self._move(place, free, projected(rule, weight_at(place), self.count, place.gates))

    @torch.no_grad()
    def report(self) -> dict[str, float]:
        """By the names of rules: the value of a penalty now, how far outside the worst weight of a constraint is."""
        found = {}
        for number, rule in enumerate(self.rules):
            free = [place for place in self._distinct(number) if any(moved(leaf) for leaf in leaves_of(place))]
            if "penalty" in rule:
                terms = [factor(rule, self.count) * penalty_of(rule["penalty"], weight_at(place)) for place in free]
                found[rule["name"]] = float(sum(terms))
            else:
                outside = [violation_of(rule, weight_at(place), self.count, place.gates) for place in free]
                found[rule["name"]] = float(max(outside, default=0.0))
        return found
