"""Constraints on blocks of weights: projections at every N-th step, and violations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from regkit.kinds import Constraint
from regkit.rules.weight_rule import WeightRule, Work
from regkit.weights.block import Block


@dataclass(eq=False)
class ConstraintRule(WeightRule):
    """A constraint on weights.

    due: the blocks to be projected at the next step that trains them.
    """

    kind: Constraint
    due: set[Block] = field(default_factory=set)
    _last_due: int = -1
    """The last step at which all blocks were due."""

    def at_step(self, index: int) -> Constraint:
        """The constraint, with its bound scaled by the schedule."""
        return self.kind if self.binding.schedule is None else self.kind.at(self.binding.factor(index))

    def project(self, work: Work, index: int, now: bool = False) -> None:
        """Project blocks at every N-th step, and later the blocks that the N-th step did not train.

        Where several optimizers share out the N-th step, each moves the parameters that it trains, and these are
        projected.

        work: the blocks that may be projected.
        now: whether all of these are projected, due or not.
        """
        due: set[Block] | None = None
        if not now and (index + 1) % self.binding.every:
            due = self.due
            if not due:
                return
        elif not now and index != self._last_due:
            self._last_due, self.due = index, set(self.blocks)  # until they are projected: that may fail
        constraint = self.kind if self.binding.schedule is None else self.at_step(index)
        for batch, _, _ in work.batches:
            ready = batch if due is None else batch.restrict_to_blocks(due)
            if ready.blocks:
                self.at = ready
                ready.project(constraint)
                if due is not None or not work.all:
                    self.due -= ready.members
        for block, storages, acted_on in work.lone:
            if due is None or block in due:
                self.at = block
                block.move(storages, acted_on, constraint.project(block.weight(storages)))
                self.due.discard(block)
        if work.all and due is None:
            self.due = set()
        self.at = None

    def restore(self, count: int, due: Iterable[str]) -> None:
        """Go on after `count` steps, with the blocks of these names due."""
        names = set(due)
        self._last_due, self.due = count - 1, {block for block in self.blocks if block.name in names}

    def project_all(self, index: int) -> None:
        """Project every block that is not frozen."""
        due = set(self.due)
        self.project(self.work(self.snapshots.now(), self.moving()), index, now=True)
        self.due = due

    def violation(self, index: int) -> Tensor | None:
        """The largest violation over the blocks that are not frozen, None where all are.  -> ()."""
        constraint, work = self.at_step(index), self.work(self.snapshots.now(), self.moving())
        found = [batch.violation(constraint) for batch in self.at_work(batch for batch, _, _ in work.batches)]
        found += [constraint.violation(block.weight(storages)) for block, storages, _ in self.at_work(work.lone)]
        return torch.stack([one.to(found[0].device) for one in found]).amax() if found else None
