"""The work of an optimizer's steps on a model: worked out once, as lists that each step goes through.

Between two steps the forward and backward passes drive Python's own code and objects out of the processor's caches, and
a function that takes 0.1 µs in a loop of its own takes 1 to 2 µs in training. So a step asks as few as can be.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from operator import is_, itemgetter

from torch.optim import Optimizer

from regkit.engine.failed_step import PenalizedGradient
from regkit.rules.penalty_rule import PenaltyRule
from regkit.rules.rule_set import RuleSet
from regkit.rules.weight_rule import Work
from regkit.runtime.step import OwnedParameters, Step
from regkit.weights.snapshot import Snapshot

_params = itemgetter("params")


class Jobs:
    """The work of a step that trains certain parameters: rules with the blocks to act on, in the order of acting.

    trained: the ids of the parameters that the step trains.
    ascending: of these, the ids of those that the optimizer moves up the gradient.
    usual: whether all parameters that the optimizer owns are trained, and none ascends.
    first_changed: the number, among the owned parameters, of the first one whose gradient is added to.
    by_loss: the rules via loss, each with the ids of its parameters that are trained.
    recorders: of modules that are trained, each with the ids of its parameters that are.
    untrained_recorders: all others.
    averaged: whether weights are changed behind the update of a schedule-free optimizer.
    """

    averaged = False

    def __init__(
        self, rules: RuleSet, snapshot: Snapshot, owned: OwnedParameters, trained: frozenset[int], up: frozenset[int]
    ) -> None:
        self.snapshot, self.trained, self.ascending = snapshot, trained, up
        self.usual = trained is owned.ids and not up
        numbers = {id(parameter): number for number, parameter in enumerate(owned.parameters)}
        self.gradients = _busy((rule, rule.work(snapshot, trained, numbers, up)) for rule in rules.by_gradient)
        self.decays = _busy((rule, rule.work(snapshot, trained)) for rule in rules.by_decay)
        self.proximal = _busy((rule, rule.work(snapshot, trained)) for rule in rules.by_prox)
        self.projections = [(rule, rule.work(snapshot, trained)) for rule in rules.constraints]
        changed = (numbers[key] for rule in (*rules.by_gradient, *rules.by_decay) for key in self._trained_by(rule))
        self.first_changed = next(changed, None)
        self.by_loss = [(rule, ids) for rule in rules.by_loss if (ids := frozenset(self._trained_by(rule)))]
        recorders = [(one, trained.intersection(map(id, one.parameters))) for one in rules.recorders]
        self.recorders = [(recorder, ids) for recorder, ids in recorders if ids]
        # Trained elsewhere, or not at all: that may change at any time.
        self.untrained_recorders = [recorder for recorder, ids in recorders if not ids]

    def _trained_by(self, rule: PenaltyRule) -> Iterator[int]:
        """The ids of the parameters of a rule that are trained."""
        storages = chain.from_iterable(self.snapshot.storages[block] for block in rule.blocks)
        return (id(p) for storage in storages for p in storage.parameters if id(p) in self.trained)


def _busy(acts: Iterable[tuple[PenaltyRule, Work]]) -> list[tuple[PenaltyRule, Work]]:
    """The rules that have a block to act on, each with all such blocks."""
    return [(rule, work) for rule, work in acts if work.batches or work.lone]


class Program:
    """The work of one optimizer's steps on the model of one snapshot.

    optimizer: None for a manual step.
    owned: the parameters of the optimizer that are the model's; left out, they are found.
    jobs: of the last step.
    """

    def __init__(self, optimizer: Optimizer | None, snapshot: Snapshot, owned: OwnedParameters | None = None) -> None:
        self.snapshot = snapshot
        self._groups = [] if optimizer is None else list(optimizer.param_groups)
        self._sizes = list(map(len, map(_params, self._groups)))
        self._parameters = list(chain.from_iterable(map(_params, self._groups)))
        if owned is None:
            group_of = {id(p): group for group in self._groups for p in group["params"]}
            owned = OwnedParameters(snapshot.parameters, group_of)
        self.owned = owned
        self.jobs: Jobs | None = None
        self._optimizer: weakref.ref[Optimizer] | None = None
        if optimizer is not None:
            key, programs = id(optimizer), snapshot.programs
            self._optimizer = weakref.ref(optimizer, lambda _: programs.pop(key, None))

    def holds(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer has the parameters and groups that the program was made for, and the model has, too."""
        groups = optimizer.param_groups
        return (
            self._optimizer is not None
            and self._optimizer() is optimizer
            and list(map(len, map(_params, groups))) == self._sizes
            and all(map(is_, groups, self._groups))
            and all(map(is_, chain.from_iterable(map(_params, groups)), self._parameters))
            and self.snapshot.holds()
        )


@dataclass(eq=False, kw_only=True)
class ActiveStep(Step):
    """A step that runs.

    program: the work of the optimizer's steps.
    jobs: the work of this step, once gradients are complete.
    penalized: the gradient that stands for those with penalties in them, once there are.
    """

    program: Program
    jobs: Jobs | None = None
    penalized: PenalizedGradient | None = None
