"""Penalties on weights at a step: gradients, decay and proximal operators, on live blocks of parameters.

Nothing is decided here: a rule's kind, its sites and its factor come from the plan and the step.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Final

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

_TWO_RATES: Final = "what makes up one weight has different learning rates"


def _lr(step: Step, parameter: Tensor) -> float | Tensor:
    """The learning rate at which a step moves a parameter. Raises StepError where the optimizer has none."""
    group = step.groups[id(parameter)]
    lr: float | Tensor | None = group.get("scheduled_lr", group.get("lr"))  # a schedule-free one warms up by itself
    if lr is None:
        raise StepError(f"{step.by} has no `lr`, which a proximal or decoupled rule multiplies")
    return lr


@dataclass(eq=False)
class PenaltyRule(WeightRule):
    """A penalty on weights.

    addends: the penalties of which the kind is the sum, if it is one.
    ledger: the tickets of a rule via the loss.
    """

    kind: Penalty
    addends: tuple[Penalty, ...] = ()
    ledger: Tickets = field(default_factory=Tickets)
    _shrunk: dict[Hashable, tuple[float | Tensor, set[int]]] = field(default_factory=dict)
    """Of weights of several parameters: the rate at which the last step shrunk each, and the ids of what it trained."""
    _last: int = -1
    """The number of that step."""

    def value(self, index: int) -> Tensor | None:
        """strength · factor · Σ Ω over the blocks that are not frozen, None where all are.  -> ()."""
        return self._sum(self.moving(), self.binding.amount(index))

    def trained_value(self, step: Step) -> Tensor | None:
        """strength · factor · Σ Ω over the blocks that a step trains, None where there are none.  -> ()."""
        return self._sum(step.trained, self.binding.amount(step.index))

    def _sum(self, ids: frozenset[int], amount: float) -> Tensor | None:
        work = self.work(self.snapshots.now(), ids)
        values = [batch.value(self.kind) for batch in self.at_work(batch for batch, _, _ in work.batches)]
        values += [self.kind.value(block.weight(storages)) for block, storages, _ in self.at_work(work.lone)]
        if not values:
            return None
        total = values[0]
        for value in values[1:]:
            total = total + value.to(total.device)
        return total * amount

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
        for block, storages, acted_on in work.lone:
            whole = self.binding.via == "proximal" and len(storages) > 1 and self.kind.separable != "elements"
            if whole and isinstance(block.shares(acted_on), Tensor):
                raise StepError(
                    f"rule {self.binding.key!r} is proximal, on a sum of which a part is pruned, and "
                    f"{self.kind.kind} does not act on each number alone. Use via gradient"
                )
            self._once(block, acted_on, step)
            # A decoupled rule decays each of two biases at its own rate; behind one weight there can be but one.
            for together in [acted_on] if self.binding.via == "proximal" else [[storage] for storage in acted_on]:
                first, *others = [_lr(step, parameter) for parameter in _trained(step, together)]
                if any(other is not first and bool(other != first) for other in others):
                    raise StepError(f"rule {self.binding.key!r} is {self.binding.via}, but {_TWO_RATES}")

    def _once(self, block: Block, acted_on: Sequence[Storage], step: Step) -> list[Storage]:
        """The storages without any that another optimizer has shrunk whole in this step: of a g and a v, say.

        Raises StepError where the learning rate of that one was another.
        """
        if step.index != self._last:
            self._last, self._shrunk = step.index, {}
        found = []
        for storage in acted_on:
            rate, by = self._shrunk.get((block, storage.identity), (0.0, None))
            trained = _trained(step, [storage])
            if by is None or not by.isdisjoint(map(id, trained)):  # or the step is taken again
                found.append(storage)
            elif any(rate is not lr and bool(rate != lr) for lr in (_lr(step, one) for one in trained)):
                raise StepError(f"rule {self.binding.key!r} is {self.binding.via}, but {_TWO_RATES}")
        return found

    def _remember(self, block: Block, acted_on: Sequence[Storage], step: Step) -> None:
        """Remember weights that were shrunk and belong to several parameters, which other optimizers may own."""
        for storage in acted_on:
            if len(storage.parameters) > 1:
                trained = _trained(step, [storage])
                self._shrunk[block, storage.identity] = _lr(step, trained[0]), set(map(id, trained))

    def add_gradient(self, work: Work, step: Step, found: Sequence[Tensor]) -> None:
        """grad += strength · factor · ∇Ω(w), times the loss scale that is in the gradients.  found: the gradients."""
        amount = self.kind.strength if self.binding.schedule is None else self.binding.amount(step.index)
        if not amount:
            return
        for batch, pick, sign in work.batches:
            self.at = batch
            gradients = pick(found)
            if isinstance(batch, Shards) and not batch.lie_alike(gradients):
                self._add_whole(batch, step, amount)
                continue
            # A new list, which a stranger's kind may change.
            own = [*gradients] if batch.whole else batch.views(gradients)
            if step.scale is not None and own:
                batch.add_scaled(self.kind, own, sign * amount, step.scale)
            elif own:
                weights: list[Tensor] = [*batch.parameters] if batch.whole else batch.views(batch.parameters)
                self.kind.add_gradients(weights, own, sign * amount)
        for block, storages, acted_on in work.lone:
            self.at = block
            self._add(step, amount, block, storages, acted_on)
        self.at = None

    def _add(self, step: Step, amount: float, block: Block, storages: Sequence[Storage], to: list[Storage]) -> None:
        """Add the gradient of one block to the gradients of the parameters in the storages `to`."""
        gradient = self.kind.gradient(block.weight(storages))
        if step.scale is not None:
            gradient = gradient * step.scale.to(gradient.device)
        for storage in to:
            storage.add(block.view, gradient, _signed(step, storage, amount))

    def _add_whole(self, batch: Batch, step: Step, amount: float) -> None:
        """Add the gradients of a batch where gradients are not sharded as their parameters are."""
        for block, parameter in zip(batch.blocks, batch.parameters, strict=True):
            storage: Storage = Sharded(parameter)
            self._add(step, amount, block, [storage], [storage])

    def decay(self, work: Work, step: Step) -> None:
        """w −= lr · strength · factor · ∇Ω(w), before the update, as torch's AdamW."""
        amount = self.binding.amount(step.index)
        if not amount:
            return
        for batch in self.at_work(batch for batch, _, _ in work.batches):
            for parameter, w in batch.each():
                w.copy_(w - self.kind.gradient(w) * (_lr(step, parameter) * amount))
        for block, storages, acted_on in self.at_work(work.lone):
            gradient = self.kind.gradient(block.weight(storages))
            for storage in self._once(block, acted_on, step):
                lr = _lr(step, _trained(step, [storage])[0])
                block.write(storage, block.view(storage.read()) - gradient * (lr * amount))
                self._remember(block, [storage], step)

    def shrink(self, work: Work, step: Step) -> None:
        """w = prox(w, lr · strength · factor), after the update.

        For a sum of n trained parameters the step counts n times: moving each by δ/n costs ½‖δ‖²/n. One parameter that
        is both of two biases counts four times: moving it by δ/2 costs ½‖δ‖²/4. A number that is pruned does not count.
        """
        amount = self.binding.amount(step.index)
        if not amount:
            return
        for batch in self.at_work(batch for batch, _, _ in work.batches):
            for parameter, w in batch.each():
                w.copy_(self.kind.prox(w, _lr(step, parameter) * amount))
        for block, storages, trained in self.at_work(work.lone):
            if acted_on := self._once(block, trained, step):
                reach = block.reach(acted_on) if len(storages) > 1 else 1
                size = _lr(step, _trained(step, acted_on)[0]) * amount * reach
                block.move(storages, acted_on, self.kind.prox(block.weight(storages), size))
                self._remember(block, acted_on, step)


def _trained(step: Step, storages: Sequence[Storage]) -> list[nn.Parameter]:
    """The parameters in the storages that a step trains."""
    return [parameter for storage in storages for parameter in storage.parameters if id(parameter) in step.trained]


def _signed(step: Step, storage: Storage, amount: float) -> list[tuple[nn.Parameter, float]]:
    """The parameters in a storage that a step trains, each with the amount to add to its gradient."""
    # An optimizer that maximizes turns the gradient around; the penalty is made small all the same.
    trained = _trained(step, [storage])
    return [(one, -amount if step.groups[id(one)].get("maximize") else amount) for one in trained]
