"""The trial of every kind before rules are in force: results are checked, and list forms are compared with loops."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Final, NoReturn

import torch
from torch import Tensor

from regkit.activity import Activity, Sequenced, Stepped, at_least_float32
from regkit.errors import AttachError, PluginError, StepError, listing
from regkit.kinds import Constraint, Penalty
from regkit.rules.activity_rule import ActivityRule
from regkit.rules.closed_form import Recorded, Term, evaluate
from regkit.rules.constraint_rule import ConstraintRule
from regkit.rules.penalty_rule import PenaltyRule
from regkit.rules.rule_set import RuleSet, named
from regkit.rules.weight_rule import WeightRule
from regkit.weights.batch import LOOPS, Batch, own_forms
from regkit.weights.block import Block
from regkit.weights.storage import Storage


def try_kinds(rules: RuleSet) -> None:
    """Try every kind, once for all rules of equal kinds on weights that look alike.

    Tried are the rules on weights, the sums that were made of penalties, and one activity rule of each kind, on made-up
    outputs. Raises PluginError where a kind does not keep its contract, AttachError where a kind could not act on a
    weight.
    """
    activities = {(type(rule.binding.kind), rule.binding.kind.describe()): rule for rule in rules.activities}
    tried: set[Hashable] = set()
    for rule in (*rules.on_weights, *(rule for rule in rules.by_gradient if rule.addends), *activities.values()):
        try:
            named(rule, _try_once, rule, tried)
        except StepError as error:
            raise PluginError(str(error)) from error.__cause__
    _refuse_contradictions(rules)


def _try_once(rule: WeightRule | ActivityRule, tried: set[Hashable]) -> None:
    """Try a rule's kind, unless its key is among the keys of rules that were tried."""
    key = _key(rule)
    if key is None or key not in tried:
        if isinstance(rule, PenaltyRule):
            _try_penalty(rule)
        elif isinstance(rule, ConstraintRule):
            _try_constraint(rule)
        elif isinstance(rule, ActivityRule):
            _try_activity_penalty(rule)
        tried.add(key)


def _key(rule: WeightRule | ActivityRule) -> Hashable:
    """A key: of rules with equal keys only one need be tried. None: the rule must be tried itself."""
    if isinstance(rule, ActivityRule) or (isinstance(rule, PenaltyRule) and rule.addends):
        return None
    if rule.placed(rule.snapshots.now()).lone:
        return None
    weights = (block.weight(storages) for block, storages in rule.each())
    looks = frozenset((w.shape, w.stride(), w.dtype, w.device) for w in weights)
    key = rule.binding.kind, rule.binding.via, rule.binding.schedule, looks
    try:
        hash(key)
    except TypeError:  # an option is a list
        return None
    return key


def _try_penalty(rule: PenaltyRule) -> None:
    """Try a penalty on a block of each shape. Raises PluginError; AttachError where a weight cannot be written."""
    penalty, via = rule.kind, rule.binding.via
    for w in _samples(rule):
        _check_numbers(rule, w)
        _check_result(rule, "value", penalty.value(w), ())
        gradient = penalty.gradient(w)
        _check_result(rule, "gradient", gradient, tuple(w.shape))
        if via in ("gradient", "loss") and not bool((gradient * penalty.strength).to(w.dtype).isfinite().all()):
            size = f"a weight of {w.flatten()[0].item():g}"
            raise AttachError(f"what is added to the gradient of {size} is infinite in its {w.dtype}")
        if via == "proximal":
            _check_result(rule, "prox", penalty.prox(w, 0.1), tuple(w.shape))
        if rule.addends:
            _check_sum(rule, w)
            _check_sum(rule, w * torch.linspace(-3, 3, w.numel()).view(w.shape).to(w))
    for batch in rule.at_work(rule.placed(rule.snapshots.now()).batches):
        _check_forms(rule, _forms_of_penalty(penalty, _small_weights(batch), via == "loss"))
    if via in ("proximal", "decoupled"):
        _check_writable(rule, lambda w: [w * 0.5])


def _try_constraint(rule: ConstraintRule) -> None:
    """Try a constraint on a block of each shape. Raises PluginError; AttachError where a weight cannot be written."""
    constraint = rule.at_step(0)
    for w in _samples(rule):
        _check_numbers(rule, w)
        _check_result(rule, "project", constraint.project(w), tuple(w.shape))
        _check_result(rule, "violation", constraint.violation(w), ())
    for batch in rule.at_work(rule.placed(rule.snapshots.now()).batches):
        _check_forms(rule, _forms_of_constraint(constraint, _small_weights(batch)))
    # One of the points is far outside, so that the projection is sure to move it.
    _check_writable(rule, lambda w: [constraint.project(w), constraint.project(w * 1e3)])


@torch.enable_grad()
def _try_activity_penalty(rule: ActivityRule) -> None:
    """Raise PluginError where the gradient that the kind adds is not that of its value, for a few small outputs."""
    kind = rule.kind
    if not kind.offers_gradients:
        return
    leaf = torch.linspace(-1, 9, 36, dtype=torch.float64).cos().view(3, 2, 6).detach().requires_grad_()
    valid = torch.tensor([[1, 1], [1, 1], [1, 0]], dtype=torch.bool).unsqueeze(-1)
    activity = Activity((Sequenced(leaf, valid), Sequenced(leaf, backward=True), Stepped(leaf[1], leaf[0])))
    source = Recorded(activity)
    source.terms.append(Term(kind, 0.3, 0, rule))
    (closed,) = torch.autograd.grad(evaluate([source], _raise, []), leaf)
    (wanted,) = torch.autograd.grad(kind.value(activity) * 0.3, leaf)
    if not torch.allclose(closed, wanted, 1e-6, 1e-6, equal_nan=True):
        raise PluginError(f"{_method(rule, 'add_gradients')} does not add the gradient of its value")


def _raise(_: object, error: Exception) -> NoReturn:
    raise error


# --- checks ----------------------------------------------------------------------------------------------------------


def _samples(rule: WeightRule) -> Iterator[Tensor]:
    """Ones, then zeros, for blocks of each shape, dtype and device; on the CPU for blocks on the meta device."""
    seen = set()
    for block, storages in rule.each():
        w = block.weight(storages)
        device = torch.device("cpu") if w.is_meta else w.device
        if (key := (w.shape, w.dtype, device)) not in seen:
            seen.add(key)
            yield torch.ones_like(w, device=device)
            yield torch.zeros_like(w, device=device)


def _method(rule: WeightRule | ActivityRule, name: str) -> str:
    """A method of the rule's kind, for the sentence of an error."""
    kind = type(rule.kind)
    return f"rule {rule.binding.key!r}: {name} of {kind.__module__}.{kind.__qualname__}"


def _check_result(rule: WeightRule, method: str, result: object, shape: tuple[int, ...]) -> None:
    """Raise PluginError where a result is no finite tensor of its shape."""
    # A wrong shape would be broadcast, and change every weight without a word.
    if not isinstance(result, Tensor) or tuple(result.shape) != shape or not result.is_floating_point():
        got = f"{result.dtype} {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
        raise PluginError(f"{_method(rule, method)} returns {got}, not a floating-point tensor of shape {shape}")
    if not bool(result.isfinite().all()):
        raise PluginError(f"{_method(rule, method)} returns NaN or infinity for a weight of ones or zeros")


def _check_sum(rule: PenaltyRule, w: Tensor) -> None:
    """Raise PluginError where a sum of penalties has another gradient at w than the sum of the addends' gradients."""
    penalty = rule.kind
    wanted = sum((one.strength * one.gradient(w) for one in rule.addends), start=torch.zeros(()))
    summed, near = penalty.strength * penalty.gradient(w), 1e-4 * float(wanted.abs().amax())
    if not torch.allclose(summed, wanted.to(summed), 0, near):
        raise PluginError(
            f"rule {rule.binding.key!r}: {penalty.describe()}, which `plus` gives for the sum of "
            f"{listing(one.describe() for one in rule.addends)}, has another gradient"
        )


def _check_writable(rule: WeightRule, points: Callable[[Tensor], Sequence[Tensor]]) -> None:
    """Raise AttachError where a weight cannot be brought to certain points. points: makes points of the weight."""
    for block, storages in rule.at_work(rule.placed(rule.snapshots.now()).lone):
        for storage in storages:
            if storage.limited:
                # Each half of a sum takes a share that depends on the other half: any other point will do there.
                w = block.weight(storages) if len(storages) == 1 else block.view(storage.read())
                if not w.is_meta:
                    block.check_writable(storage, points(w) if len(storages) == 1 else [w * 0.5])


def _check_numbers(rule: PenaltyRule | ConstraintRule, w: Tensor) -> None:
    """Raise AttachError where a number of the kind is zero or infinite in the precision of the weight."""
    wide = at_least_float32(w).dtype
    for name, value in rule.kind:
        held = torch.tensor(value, dtype=wide).item() if isinstance(value, float) and value else 1.0
        if held in (0.0, math.inf, -math.inf):
            raise AttachError(f"{name} {value:g} is {held:g} in {wide}, in which weights of {w.dtype} are read")


# --- constraints that cannot hold together ---------------------------------------------------------------------------

_ROUNDS: Final = 30
_NEAR: Final = 1e-3


def _refuse_contradictions(rules: RuleSet) -> None:
    """Raise AttachError where constraints on one weight cannot hold together."""
    found: dict[Hashable, list[tuple[ConstraintRule, Block, Storage]]] = {}
    for rule in rules.constraints:
        for block, storages in rule.each():
            found.setdefault(block.place(storages), []).append((rule, block, storages[0]))
    tried: set[Hashable] = set()
    for together in found.values():
        like = together[0][2].outline()
        key = (*(id(rule) for rule, _, _ in together), like.shape, like.dtype)
        if len(together) > 1 and key not in tried:
            tried.add(key)
            whole = torch.linspace(0.5, 1.5, like.numel(), dtype=at_least_float32(like).dtype).view(like.shape)
            named(together[0][0], _refuse_contradiction, [(rule, block) for rule, block, _ in together], whole)


def _refuse_contradiction(together: Sequence[tuple[ConstraintRule, Block]], whole: Tensor) -> None:
    """Raise AttachError where a weight that is projected in turn comes to rest with one constraint violated.

    whole: such a weight, of which each constraint has a view of its own.
    """
    acting = [(rule, rule.at_step(0), block.view(whole)) for rule, block in together]
    first, left = together[0][0], list[list[float]]()
    for _ in range(_ROUNDS):
        for _, kind, view in acting:
            view.copy_(kind.project(view))
        left.append([float(kind.violation(view)) for _, kind, view in acting])
        if max(left[-1]) <= _NEAR:
            return
    for (rule, _), before, now in zip(together, left[_ROUNDS // 2], left[-1], strict=True):
        if now > _NEAR and now >= before * (1 - 1e-6):
            others = listing(one.binding.label for one, _ in together if one is not first)
            raise AttachError(
                f"cannot hold of {together[0][1].name} together with {others}: projected onto each in turn, a weight "
                f"stays {now:.3g} off {rule.kind.kind}"
            )


# --- list forms against loops ----------------------------------------------------------------------------------------

Compared = Iterator[tuple[str, Sequence[Tensor], Sequence[Tensor]]]
"""The name of each list form that a kind has of its own, with the results of the form and of the loop."""


def _small_weights(batch: Batch) -> list[Tensor]:
    """Ones, zeros and ramps up to 1 and 100, of each shape among a batch's weights; sizes above 8 are cut to 8."""
    found: list[Tensor] = []
    small = (w[(slice(8),) * w.dim()] for w in batch.outlines())
    for w in {w.shape: w for w in small}.values():
        like = torch.ones_like(w, device="cpu" if w.is_meta else None)
        ramp = torch.linspace(-1, 1, like.numel(), dtype=like.dtype, device=like.device).view(like.shape)
        found += [like, torch.zeros_like(like), ramp, 100 * ramp]
    return found


def _forms_of_penalty(penalty: Penalty, weights: list[Tensor], by_loss: bool) -> Compared:
    """The list forms of a penalty at weights. by_loss: with the gradient that autograd makes of `values`."""
    own, kept = own_forms(penalty), [w.clone() for w in weights]
    if "values" in own:
        yield "values", [penalty.values(list(weights))], [Penalty.values(penalty, kept)]
        if by_loss:
            with torch.enable_grad():
                leaves = [w.clone().requires_grad_() for w in weights]
                slopes = torch.autograd.grad(penalty.values(leaves), leaves)
                yield "values", slopes, torch.autograd.grad(Penalty.values(penalty, leaves), leaves)
        yield "values", weights, kept
    if "add_gradients" in own:
        added, wanted = ([torch.ones_like(w) for w in weights] for _ in range(2))
        penalty.add_gradients(list(weights), list(added), 0.3)
        Penalty.add_gradients(penalty, kept, wanted, 0.3)
        yield "add_gradients", added, wanted
        yield "add_gradients", weights, kept


def _forms_of_constraint(constraint: Constraint, weights: list[Tensor]) -> Compared:
    """The list form of a constraint at weights."""
    if "project_" in own_forms(constraint):
        projected = [w.clone() for w in weights]
        constraint.project_(list(projected))
        yield "project_", projected, [constraint.project(w) for w in weights]


def _check_forms(rule: WeightRule, compared: Compared) -> None:
    """Raise PluginError where a list form and the loop have different results."""
    for form, found, wanted in compared:
        for one, other in zip(found, wanted, strict=True):
            if one.shape != other.shape or not _close(one, other):
                raise PluginError(
                    f"{_method(rule, form)} does not do what the loop over its {LOOPS[form]} does, for weights of "
                    f"shape {tuple(other.shape)}"
                )


def _close(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal up to rounding. Most are just equal, which is told in a tenth of the time.

    Where large terms cancel, what is left of them is as uncertain as they are: hence the largest number's share.
    """
    near = max(torch.finfo(of.dtype).eps for of in (one, other)) ** 0.5
    now = one.to(other)
    if torch.equal(now, other):
        return True
    largest = max(1.0, float(torch.where(other.isfinite(), other, 0.0).abs().max()))
    return torch.allclose(now, other, near, near * largest, equal_nan=True)
