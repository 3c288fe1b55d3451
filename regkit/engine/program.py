"""What an optimizer's steps do to a model: worked out once, as lists that are gone through at each step.

Between two steps the forward and backward passes drive Python's own code and objects out of the processor's caches, and
a function that takes 0.1 µs in a loop of its own takes 1 to 2 µs in training. So a step asks as few as can be.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from operator import is_, itemgetter

from torch import nn
from torch.optim import Optimizer

from regkit.recording.recorder import Recorder
from regkit.rules.constraint_rule import ConstraintRule
from regkit.rules.penalty_rule import PenaltyRule
from regkit.rules.rule_set import RuleSet
from regkit.rules.weight_rule import Work
from regkit.runtime.step import OwnedParameters, Step
from regkit.weights.snapshot import Snapshot

Acts = list[tuple[PenaltyRule, Work]]
"""Rules, and all that each acts on."""

_params = itemgetter("params")


class Jobs:
    """What is done where these parameters are trained: what each rule acts on, in the order in which they do.

    up: of the trained ones, those that their optimizer moves up the gradient. usual: whether all that the optimizer
    owns are trained, and none up. moves: whether anything is done behind the update. marked: the number, among what the
    optimizer owns, of the first parameter whose gradient is added to. losses, recorders: what is trained of each;
    apart: the recorders of which nothing is.
    """

    def __init__(
        self, rules: RuleSet, snapshot: Snapshot, owned: OwnedParameters, trained: frozenset[int], up: frozenset[int]
    ) -> None:
        self.snapshot, self.trained, self.up = snapshot, trained, up
        self.usual = trained is owned.ids and not up
        numbers = {id(leaf): number for number, leaf in enumerate(owned.parameters)}
        self.gradients = _busy((rule, rule.work(snapshot, trained, numbers, up)) for rule in rules.by_gradient)
        self.decays = _busy((rule, rule.work(snapshot, trained)) for rule in rules.by_decay)
        self.proximal = _busy((rule, rule.work(snapshot, trained)) for rule in rules.by_prox)
        self.projections: list[tuple[ConstraintRule, Work]] = [
            (rule, rule.work(snapshot, trained)) for rule in rules.constraints
        ]
        self.moves = bool(self.proximal or self.projections)
        changed = (numbers[id(leaf)] for rule in (*rules.by_gradient, *rules.by_decay) for leaf in self._of(rule))
        self.marked = next(changed, None)
        self.losses = [
            (rule, mine) for rule in rules.by_loss if (mine := frozenset(id(leaf) for leaf in self._of(rule)))
        ]
        self.recorders: list[tuple[Recorder, frozenset[int]]] = []
        self.apart: list[Recorder] = []
        for recorder in rules.recorders:
            if mine := trained.intersection(map(id, recorder.parameters)):
                self.recorders.append((recorder, mine))
            else:  # trained elsewhere, or not at all: that may change at any time
                self.apart.append(recorder)

    def _of(self, rule: PenaltyRule) -> Iterator[nn.Parameter]:
        """The trained parameters of a rule."""
        storages = chain.from_iterable(self.snapshot.storages[block] for block in rule.blocks)
        return (leaf for storage in storages for leaf in storage.parameters if id(leaf) in self.trained)


def _busy(acts: Iterable[tuple[PenaltyRule, Work]]) -> Acts:
    return [(rule, work) for rule, work in acts if work.batches or work.lone]


class Program:
    """What the steps of one optimizer do to the model of one snapshot.

    jobs: those of its last step. optimizer_seen: whether what is asked of an optimizer at its first step was asked.
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
        self.optimizer_seen = False
        self._optimizer: weakref.ref[Optimizer] | None = None
        if optimizer is not None:
            key, programs = id(optimizer), snapshot.programs
            self._optimizer = weakref.ref(optimizer, lambda _: programs.pop(key, None))

    def holds(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer has the parameters that it had, in the same groups, and the model, too."""
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

    program: what the optimizer's steps do. jobs: those of this one, once gradients are complete.
    """

    program: Program
    jobs: Jobs | None = None
