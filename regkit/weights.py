"""What one step does to weights: gradients, decay, proximal operators, projections, on live blocks of parameters.

Nothing here is decided: a rule's kind, its sites and its factor come from the plan and the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.optim import LBFGS

from regkit.batches import Batch, compare_constraint, compare_penalty, samples
from regkit.blocks import Block
from regkit.errors import PluginError, StepError, listing
from regkit.kinds import Constraint, Penalty
from regkit.ledger import Ledger
from regkit.step import Step
from regkit.storage import Storage
from regkit.weightrule import WeightRule

Repeated = list[tuple[Batch, Callable[[list[Tensor]], list[Tensor]]]]
"""Batches, and what picks their gradients out of those of a step's leaves."""


def _lr(step: Step, parameter: Tensor) -> float | Tensor:
    group = step.groups[id(parameter)]
    if "lr" not in group:
        raise StepError(f"{step.by} has no `lr`, which a proximal or decoupled rule multiplies")
    lr: float | Tensor = group["lr"]
    return lr


@dataclass(eq=False)
class PenaltyRule(WeightRule):
    """A penalty on weights. The ledger is of one via the loss. addends: what it is the sum of, if it is one."""

    addends: tuple[Penalty, ...] = ()
    ledger: Ledger = field(default_factory=Ledger)

    def prove(self) -> None:
        for w in self._samples():
            self._expect("value", self.penalty.value(w), ())
            self._expect("gradient", self.penalty.gradient(w), tuple(w.shape))
            if self.binding.via == "proximal":
                self._expect("prox", self.penalty.prox(w, 0.1), tuple(w.shape))
            if self.addends:
                self._prove_sum(w)
                self._prove_sum(w * torch.linspace(-3, 3, w.numel()).view(w.shape).to(w))
        for batch in self._at(self._batches):
            self._agree(compare_penalty(self.penalty, samples(batch), self.binding.via == "loss"))
        if self.binding.via in ("proximal", "decoupled"):
            for block, storages in self._each():
                limited = [storage for storage in storages if storage.limited]
                kept = block.weight(storages) if limited else None
                if kept is not None and not kept.is_meta:
                    for storage in limited:
                        block.prove(storage, [kept * 0.5])

    def _prove_sum(self, w: Tensor) -> None:
        wanted = sum((one.strength * one.gradient(w) for one in self.addends), start=torch.zeros(()))
        ours, near = self.penalty.strength * self.penalty.gradient(w), 1e-4 * float(wanted.abs().amax())
        if not torch.allclose(ours, wanted.to(ours), 0, near):
            raise PluginError(
                f"rule {self.binding.key!r}: {self.penalty.describe()}, which `plus` gives for the sum of "
                f"{listing(one.describe() for one in self.addends)}, has another gradient"
            )

    @cached_property
    def penalty(self) -> Penalty:
        """Its kind."""
        kind = self.binding.kind
        assert isinstance(kind, Penalty)
        return kind

    def amount(self, index: int) -> float:
        """strength · factor at a step."""
        strength = self.penalty.strength
        return strength if self.binding.schedule is None else strength * self.binding.factor(index)

    def value(self, index: int) -> Tensor | None:
        """strength · factor · Σ Ω over the blocks that are not frozen, None where all are.  -> ()."""
        return self._sum(self.unfrozen(), self.amount(index))

    def trained_value(self, step: Step) -> Tensor | None:
        """The same over the blocks that this step trains."""
        return self._sum(step.trained, self.amount(step.index))

    def _sum(self, ids: frozenset[int], amount: float) -> Tensor | None:
        total: Tensor | None = None
        for value in self._values(ids):
            total = value if total is None else total + value.to(total.device)
        return None if total is None else total * amount

    def _values(self, ids: frozenset[int]) -> Iterator[Tensor]:
        batches, others = self._live(ids, "values")
        for batch in batches:
            yield self.penalty.values(batch.weights())
        for block, storages, _ in others:
            yield self.penalty.value(block.weight(storages))

    def check(self, step: Step) -> None:
        """Raise StepError where a proximal or decoupled rule cannot act in this step, before anything is changed."""
        for _, _, mine in self._live(step.trained)[1]:
            if isinstance(step.optimizer, LBFGS) or step.evaluations > 1:
                raise StepError(
                    f"rule {self.binding.key!r} is {self.binding.via}, which needs a single gradient evaluation per "
                    f"step; {step.by} evaluates its closure several times. Use via gradient"
                )
            # A decoupled rule decays each of two biases at its own rate; behind one weight there can be but one.
            for together in [mine] if self.binding.via == "proximal" else [[storage] for storage in mine]:
                first, *others = [_lr(step, leaf) for leaf in _leaves(step, together)]
                if any(other is not first and bool(other != first) for other in others):
                    raise StepError(
                        f"rule {self.binding.key!r} is {self.binding.via}, but what makes up one weight has different "
                        "learning rates"
                    )

    def add_gradient(self, step: Step) -> None:
        """grad += strength · factor · ∇Ω(w), times the scale that the gradients have."""
        amount = self.amount(step.index)
        if amount == 0:
            return
        sign = _sign(step)
        batches, others = self._live(step.trained, "add_gradients" if sign else "")
        for batch in batches:
            if step.scale is None:
                batch.add_gradients(self.penalty, sign * amount)
            else:
                batch.add_scaled(self.penalty, sign * amount, step.scale)
        for block, storages, mine in others:
            gradient = self.penalty.gradient(block.weight(storages))
            if step.scale is not None:
                gradient = gradient * step.scale.to(gradient.device)
            for storage in mine:
                storage.add(block.view, gradient, list(_signed(step, storage, amount)))

    def repeatable(self, leaves: Sequence[nn.Parameter], ids: frozenset[int]) -> Repeated | None:
        """What `repeat` is for where a step trains these leaves: None where that is not batches alone."""
        batches, others = self._live(ids, "add_gradients")
        return None if any(others) else [(batch, batch.picked(leaves)) for batch in batches]

    def repeat(self, work: Repeated, index: int, found: list[Tensor]) -> None:
        """As add_gradient, where it is known what to act on, and gradients are neither scaled nor turned around.

        found: the gradients of all the leaves.
        """
        amount = self.amount(index)
        for batch, picked in work if amount else ():
            self.at = batch
            self.penalty.add_gradients(batch.weights(), picked(found), amount)
        self.at = None

    def decay(self, step: Step) -> None:
        """w −= lr · strength · factor · ∇Ω(w), before the update, as torch's AdamW."""
        amount = self.amount(step.index)
        if amount == 0:
            return
        for block, storages, mine in self._live(step.trained)[1]:
            gradient = self.penalty.gradient(block.weight(storages))
            for storage in mine:
                lr = _lr(step, _leaves(step, [storage])[0])
                block.write(storage, block.view(storage.read()) - gradient * (lr * amount))

    def shrink(self, step: Step) -> None:
        """w = prox(w, lr · strength · factor), after the update.

        For a sum of n trained parameters the step counts n times: moving each by δ/n costs ½‖δ‖²/n.
        """
        amount = self.amount(step.index)
        if amount == 0:
            return
        for block, storages, mine in self._live(step.trained)[1]:
            size = _lr(step, _leaves(step, mine)[0]) * amount * len(mine)
            block.move(storages, mine, self.penalty.prox(block.weight(storages), size))


def _leaves(step: Step, mine: Sequence[Storage]) -> list[nn.Parameter]:
    """The leaves that this step trains."""
    return [leaf for storage in mine for leaf in storage.leaves if id(leaf) in step.trained]


def _sign(step: Step) -> int:
    """1; -1 where the optimizer goes up the gradient, which turns what is added around; 0 where only some groups do."""
    groups = () if step.optimizer is None else step.optimizer.param_groups
    up = [group for group in groups if group.get("maximize")]
    return 1 if not up else -1 if len(up) == len(groups) else 0


def _signed(step: Step, storage: Storage, amount: float) -> Iterator[tuple[nn.Parameter, float]]:
    """The leaves that this step trains, with the amount to add for each."""
    for leaf in storage.leaves:
        if id(leaf) in step.trained:
            # An optimizer that maximizes turns the gradient around; the penalty is made small all the same.
            yield leaf, -amount if step.groups[id(leaf)].get("maximize") else amount


@dataclass(eq=False)
class ConstraintRule(WeightRule):
    """A constraint on weights. due: the blocks that wait for a step that trains them to be projected."""

    due: set[Block] = field(default_factory=set)
    _called: int = -1

    def prove(self) -> None:
        constraint = self.at_step(0)
        for w in self._samples():
            self._expect("project", constraint.project(w), tuple(w.shape))
            self._expect("violation", constraint.violation(w), ())
        for batch in self._at(self._batches):
            self._agree(compare_constraint(constraint, samples(batch)))
        for block, storages in self._each():
            limited = [storage for storage in storages if storage.limited]
            kept = block.weight(storages) if limited else None
            if kept is not None and not kept.is_meta:
                # One of the points is far outside, so that the projection is sure to move it.
                points = [constraint.project(kept), constraint.project(kept * 1e3)]
                for storage in limited:
                    block.prove(storage, points)

    @cached_property
    def constraint(self) -> Constraint:
        """Its kind."""
        kind = self.binding.kind
        assert isinstance(kind, Constraint)
        return kind

    def at_step(self, index: int) -> Constraint:
        """The constraint, its bound scaled as the schedule says."""
        return self.constraint if self.binding.schedule is None else self.constraint.at(self.binding.factor(index))

    def project(self, step: Step) -> None:
        """Project the blocks that this step trains, if it is the N-th or if the N-th did not train them."""
        if (step.index + 1) % self.binding.every == 0 and step.index != self._called:
            self._called = step.index  # once, though several optimizers may take one step together
            batch = self._all(step.trained)
            self.due = set(self.blocks)
            if batch is not None:
                self.at = batch
                self.at_step(step.index).project_(batch.weights())
                self.at, self.due = None, set()
        if self.due:
            self._project(step.index, step.trained, self.due)

    def _all(self, ids: frozenset[int]) -> Batch | None:
        """All of it, if that is one batch, and all of that has one of these ids."""
        self._resolve()
        if len(self._batches) != 1 or self._lone or "project_" not in self._own:
            return None
        return self._batches[0] if self._batches[0].ids <= ids else None

    def _project(self, index: int, ids: frozenset[int], due: set[Block]) -> None:
        """Project what of `due` is to be acted on, and take it out of there."""
        constraint = self.at_step(index)
        batches, others = self._live(ids, "project_")
        for batch in batches:
            ready = batch.among(due)
            if ready.blocks:
                constraint.project_(ready.weights())
                due -= ready.members
        for block, storages, mine in others:
            if block in due:
                block.move(storages, mine, constraint.project(block.weight(storages)))
                due.discard(block)

    def restore(self, count: int, due: Iterable[str]) -> None:
        """Go on after `count` steps, with the blocks of these names waiting."""
        names = set(due)
        self._called, self.due = count - 1, {block for block in self.blocks if block.name in names}

    def project_all(self, index: int) -> None:
        """Project every block that is not frozen."""
        self._project(index, self.unfrozen(), set(self.blocks))

    def violation(self, index: int) -> Tensor:
        """The largest violation over its blocks.  -> ()."""
        constraint = self.at_step(index)
        found = [constraint.violation(block.weight(storages)) for block, storages in self._each()]
        return torch.stack([one.to(found[0].device) for one in found]).amax()
