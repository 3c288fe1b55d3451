"""Optimizers of which a step is not `lr` times a direction: schedule-free ones, and estimated step sizes.

Schedule-free (Defazio et al. 2024, equations 2 to 4): gradients are taken at y = (1 − β)·z + β·x. The base iterate z
makes the steps; the average x ← (1 − c)·x + c·z is what `optimizer.eval()` deploys. Proximal operators and constraints
act on z. So x, an average of points of a convex set, is a point of the set; so is y, which parameters hold in training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any, Final, NoReturn

from regkit.engine.program import ActiveStep, Jobs
from regkit.errors import StepError
from regkit.kinds import Constraint
from regkit.rules.penalty_rule import PenaltyRule
from regkit.rules.weight_rule import WeightRule, Work

_Group = Mapping[str, Any]

_SHOWN: Final = frozenset(("train_mode", "scheduled_lr", "k", "r", "lr_max", "weight_lr_power", "weight_sum"))
"""Keys of a group from which c and the learning rate can be told."""

_ESTIMATED: Final = frozenset(("d0", "d_coef", "growth_rate"))
"""Keys of a group, of which there is one where `d` is an estimate by which the optimizer multiplies `lr`."""

_WRAPPED: Final = frozenset("xyz")
"""Keys that a schedule-free wrapper puts into the state of its optimizer, before the first step of that."""


def averages(group: _Group) -> bool:
    """Whether the optimizer of a group is schedule-free."""
    return ("train_mode" in group or "weight_lr_power" in group) and bool(group.get("use_schedulefree", True))


def verify(step: ActiveStep, jobs: Jobs) -> None:
    """Raise StepError where a rule of the step cannot act rightly under the step's optimizer.

    An optimizer in a schedule-free wrapper is handed z: all but constraints that are not kept by averages act as ever.
    """
    if step.optimizer is None:
        return
    for rule, work in (*jobs.decays, *jobs.proximal, *jobs.projections):
        for key in work.parameter_ids() & step.groups.keys():
            group, state = step.groups[key], step.optimizer.state.get(step.owned.current[key], {})
            averaged, decoupled = averages(group), rule.binding.via == "decoupled"
            if isinstance(rule, PenaltyRule) and "d" in group and not _ESTIMATED.isdisjoint(group):
                _refuse(rule, step, "estimates its step size, and so has none to multiply. Use via gradient")
            if averaged and decoupled:
                _refuse(rule, step, "takes steps at other weights than it is given. Use via gradient")
            if averaged and not group.keys() >= _SHOWN:
                _refuse(rule, step, "deploys an average of weights, and does not show how it is made")
            if averaged or (not decoupled and ("weight_sum" in group or ("z" in state and state.keys() <= _WRAPPED))):
                _verify_averaged(rule, work, step, group)


def _verify_averaged(rule: WeightRule, work: Work, step: ActiveStep, group: _Group) -> None:
    """Raise StepError where an average of weights that are right by a rule need not be right itself."""
    if any(storage.computed or len(storage.parameters) > 1 for storage in work.storages()):
        _refuse(rule, step, "averages parameters, of which the weight is no linear function")
    if not isinstance(rule.kind, Constraint):
        return
    if not rule.kind.convex:
        _refuse(rule, step, f"deploys an average of weights, and the set of {rule.kind.kind} is not convex")
    if rule.binding.every > 1 or rule.binding.schedule is not None:
        _refuse(rule, step, "deploys an average of the weights of all steps, and the rule is not for each alike")
    if step.index == 0 and group.get("weight_sum"):
        _refuse(rule, step, "deploys an average, in which there are weights from before attach()")


def _refuse(rule: WeightRule, step: ActiveStep, reason: str) -> NoReturn:
    raise StepError(f"{rule.binding.label} cannot act under {step.by}, which {reason}")


@contextmanager
def at_base(step: ActiveStep, jobs: Jobs) -> Iterator[None]:
    """The context in which parameters hold the base iterate z. Changes of z come to x and y at the end."""
    assert step.optimizer is not None
    touched = {key for _, work in chain(jobs.proximal, jobs.projections) for key in work.parameter_ids()}
    kept = []
    for key in touched & jobs.trained:
        parameter = step.owned.current[key]
        state = step.optimizer.state[parameter]
        kept.append((parameter, parameter.detach().clone(), state, step.groups[key]))
        parameter.detach().copy_(state["z"])
    try:
        yield
    finally:
        for parameter, y, state, group in kept:
            z, total = parameter.detach(), group["weight_sum"]
            moved = z - state["z"]
            state["z"].add_(moved)
            if total:  # or nothing is in the average yet, which starts at z
                share = group["k"] ** group["r"] * group["lr_max"] ** group["weight_lr_power"] / total
                beta = group["betas"][0] if "betas" in group else group["momentum"]
                if "x" in state:  # the implementations by the definition keep both
                    state["x"].add_(moved, alpha=share)
                z.copy_(y.add_(moved, alpha=1 - beta + beta * share))
