"""What one step does to weights: gradients, decay, proximal operators, projections, on live blocks of parameters.

Nothing here is decided: a rule's kind, its sites and its factor come from the plan and the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor, nn
from torch.optim import LBFGS

from regkit.errors import StepError
from regkit.kinds import Penalty
from regkit.recording.tickets import Tickets
from regkit.rules.weight_rule import WeightRule, Work
from regkit.runtime.step import Step
from regkit.weights.batch import Batch, Shards
from regkit.weights.block import Block
from regkit.weights.storage import Sharded, Storage


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
    ledger: Tickets = field(default_factory=Tickets)

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
        for value in self._values(self.work(self.snapshots.now(), ids)):
            total = value if total is None else total + value.to(total.device)
        return None if total is None else total * amount

    def _values(self, work: Work) -> Iterator[Tensor]:
        for batch in self.at_work(batch for batch, _, _ in work.batches):
            yield batch.value(self.penalty)
        for block, storages, _ in self.at_work(work.lone):
            yield self.penalty.value(block.weight(storages))

    def verify_applicable(self, work: Work, step: Step) -> None:
        """Raise StepError where a proximal or decoupled rule cannot act in this step, before anything is changed."""
        if isinstance(step.optimizer, LBFGS) or step.evaluations > 1:
            raise StepError(
                f"rule {self.binding.key!r} is {self.binding.via}, which needs a single gradient evaluation per "
                f"step; {step.by} evaluates its closure several times. Use via gradient"
            )
        for batch, _, _ in work.batches:
            for parameter in batch.parameters:
                _lr(step, parameter)
        for block, storages, mine in work.lone:
            whole = self.binding.via == "proximal" and len(storages) > 1 and self.penalty.separable != "elements"
            if whole and isinstance(block.shares(mine), Tensor):
                raise StepError(
                    f"rule {self.binding.key!r} is proximal, on a sum of which a part is pruned, and "
                    f"{self.penalty.kind} does not act on each number alone. Use via gradient"
                )
            # A decoupled rule decays each of two biases at its own rate; behind one weight there can be but one.
            for together in [mine] if self.binding.via == "proximal" else [[storage] for storage in mine]:
                first, *others = [_lr(step, leaf) for leaf in _leaves(step, together)]
                if any(other is not first and bool(other != first) for other in others):
                    raise StepError(
                        f"rule {self.binding.key!r} is {self.binding.via}, but what makes up one weight has different "
                        "learning rates"
                    )

    def add_gradient(self, work: Work, step: Step, found: Sequence[Tensor]) -> None:
        """grad += strength · factor · ∇Ω(w), times the scale that the gradients have.  found: the gradients."""
        amount = self.penalty.strength if self.binding.schedule is None else self.amount(step.index)
        if not amount:
            return
        for batch, pick, sign in work.batches:
            self.at = batch
            gradients = pick(found)
            if isinstance(batch, Shards) and not batch.lie_alike(gradients):
                self._add_whole(batch, step, amount)
                continue
            # A list of one's own: what is a stranger's might change it.
            own = [*gradients] if batch.whole else batch.views(gradients)
            if step.scale is not None and own:
                batch.add_scaled(self.penalty, own, sign * amount, step.scale)
            elif own:
                weights: list[Tensor] = [*batch.parameters] if batch.whole else batch.views(batch.parameters)
                self.penalty.add_gradients(weights, own, sign * amount)
        for block, storages, mine in work.lone:
            self.at = block
            self._add(step, amount, block, storages, mine)
        self.at = None

    def _add(self, step: Step, amount: float, block: Block, storages: Sequence[Storage], mine: list[Storage]) -> None:
        gradient = self.penalty.gradient(block.weight(storages))
        if step.scale is not None:
            gradient = gradient * step.scale.to(gradient.device)
        for storage in mine:
            storage.add(block.view, gradient, list(_signed(step, storage, amount)))

    def _add_whole(self, batch: Batch, step: Step, amount: float) -> None:
        """The same for gradients that are not sharded as their parameters are."""
        for block, parameter in zip(batch.blocks, batch.parameters, strict=True):
            storage: Storage = Sharded(parameter)
            self._add(step, amount, block, [storage], [storage])

    def decay(self, work: Work, step: Step) -> None:
        """w −= lr · strength · factor · ∇Ω(w), before the update, as torch's AdamW."""
        amount = self.amount(step.index)
        if not amount:
            return
        for batch in self.at_work(batch for batch, _, _ in work.batches):
            for parameter, w in batch.each():
                w.copy_(w - self.penalty.gradient(w) * (_lr(step, parameter) * amount))
        for block, storages, mine in self.at_work(work.lone):
            gradient = self.penalty.gradient(block.weight(storages))
            for storage in mine:
                lr = _lr(step, _leaves(step, [storage])[0])
                block.write(storage, block.view(storage.read()) - gradient * (lr * amount))

    def shrink(self, work: Work, step: Step) -> None:
        """w = prox(w, lr · strength · factor), after the update.

        For a sum of n trained parameters the step counts n times: moving each by δ/n costs ½‖δ‖²/n. What is pruned in
        one of them does not count there.
        """
        amount = self.amount(step.index)
        if not amount:
            return
        for batch in self.at_work(batch for batch, _, _ in work.batches):
            for parameter, w in batch.each():
                w.copy_(self.penalty.prox(w, _lr(step, parameter) * amount))
        for block, storages, mine in self.at_work(work.lone):
            shares = block.shares(mine) if len(storages) > 1 else 1
            size = _lr(step, _leaves(step, mine)[0]) * amount * shares
            block.move(storages, mine, self.penalty.prox(block.weight(storages), size))


def _leaves(step: Step, mine: Sequence[Storage]) -> list[nn.Parameter]:
    """The leaves that this step trains."""
    return [leaf for storage in mine for leaf in storage.parameters if id(leaf) in step.trained]


def _signed(step: Step, storage: Storage, amount: float) -> Iterator[tuple[nn.Parameter, float]]:
    """The leaves that this step trains, with the amount to add for each."""
    for leaf in storage.parameters:
        if id(leaf) in step.trained:
            # An optimizer that maximizes turns the gradient around; the penalty is made small all the same.
            yield leaf, -amount if step.groups[id(leaf)].get("maximize") else amount
