"""A constraint on the blocks of weights that it is bound to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from regkit.kinds import Constraint
from regkit.rules.weight_rule import WeightRule, Work
from regkit.weights.block import Block


@dataclass(eq=False)
class ConstraintRule(WeightRule):
    """A constraint on weights. due: the blocks that wait for a step that trains them to be projected."""

    due: set[Block] = field(default_factory=set)
    _called: int = -1

    @cached_property
    def constraint(self) -> Constraint:
        """Its kind."""
        kind = self.binding.kind
        assert isinstance(kind, Constraint)
        return kind

    def at_step(self, index: int) -> Constraint:
        """The constraint, its bound scaled as the schedule says."""
        return self.constraint if self.binding.schedule is None else self.constraint.at(self.binding.factor(index))

    def project(self, work: Work, index: int, now: bool = False) -> None:
        """Project what is to be acted on, if the step is the N-th or if the N-th did not train it.

        Where the N-th is a round of several optimizers, each of them moves what it trains, and that is projected.
        now: whatever is due.
        """
        due: set[Block] | None = None
        if not now and (index + 1) % self.binding.every:
            due = self.due
            if not due:
                return
        elif not now and index != self._called:
            self._called, self.due = index, set(self.blocks)  # until they are projected: that may fail
        constraint = self.constraint if self.binding.schedule is None else self.at_step(index)
        for batch, _, _ in work.batches:
            ready = batch if due is None else batch.restrict_to_blocks(due)
            if ready.blocks:
                self.at = ready
                ready.project(constraint)
                if due is not None or not work.all:
                    self.due -= ready.members
        for block, storages, mine in work.lone:
            if due is None or block in due:
                self.at = block
                block.move(storages, mine, constraint.project(block.weight(storages)))
                self.due.discard(block)
        if work.all and due is None:
            self.due = set()
        self.at = None

    def restore(self, count: int, due: Iterable[str]) -> None:
        """Go on after `count` steps, with the blocks of these names waiting."""
        names = set(due)
        self._called, self.due = count - 1, {block for block in self.blocks if block.name in names}

    def project_all(self, index: int) -> None:
        """Project every block that is not frozen."""
        due = set(self.due)
        self.project(self.work(self.snapshots.now(), self.unfrozen()), index, now=True)
        self.due = due

    def violation(self, index: int) -> Tensor:
        """The largest violation over its blocks.  -> ()."""
        constraint, placed = self.at_step(index), self.placed(self.snapshots.now())
        found = [batch.violation(constraint) for batch in self.at_work(placed.batches)]
        found += [constraint.violation(block.weight(storages)) for block, storages in self.at_work(placed.lone)]
        return torch.stack([one.to(found[0].device) for one in found]).amax()
