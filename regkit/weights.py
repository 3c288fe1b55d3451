"""What one step does to weights: gradients, decay, proximal operators, projections, on live blocks of parameters.

Nothing here is decided: a rule's kind, its sites and its factor come from the plan and the step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import is_

import torch
from torch import Tensor, nn
from torch.optim import LBFGS

from regkit.binding import Binding
from regkit.blocks import Block
from regkit.errors import PluginError, StepError
from regkit.kinds import Constraint, Penalty
from regkit.ledger import Ledger
from regkit.steps import Step
from regkit.storage import Storage


def _lr(step: Step, parameter: Tensor) -> float | Tensor:
    group = step.groups[id(parameter)]
    if "lr" not in group:
        raise StepError(f"{step.by} has no `lr`, which a proximal or decoupled rule multiplies")
    lr: float | Tensor = group["lr"]
    return lr


@dataclass(eq=False)
class WeightRule(ABC):
    """A rule on weights, with its live blocks. at: the block that it works on, for the sentence of an error."""

    binding: Binding
    blocks: list[Block]
    at: Block | None = field(default=None, init=False)
    _kept: list[Sequence[Storage]] = field(default_factory=list, init=False)
    _distinct: list[tuple[Block, Sequence[Storage]]] = field(default_factory=list, init=False)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter that it acts on."""
        for block in self.blocks:
            yield from block.leaves()

    @abstractmethod
    def prove(self) -> None:
        """Raise PluginError unless the kind returns what its contract says, on a block of each shape.

        Raises AttachError where a weight is not finite, or cannot be written as the rule needs.
        """

    def trained_by(self, step: Step) -> set[int]:
        """The ids of its parameters that this step trains."""
        return {id(parameter) for parameter in self.parameters()} & step.trained

    def _each(self) -> Iterator[tuple[Block, Sequence[Storage]]]:
        """Each block with where it is kept now. What has been tied since attach() counts once, too."""
        kept = [block.storages() for block in self.blocks]
        if len(kept) != len(self._kept) or not all(map(is_, kept, self._kept)):
            first: dict[tuple[int, ...], tuple[Block, Sequence[Storage]]] = {}
            for block, storages in zip(self.blocks, kept, strict=True):
                first.setdefault(block.place(storages), (block, storages))
            self._kept, self._distinct = kept, list(first.values())
        for block, storages in self._distinct:
            self.at = block
            yield block, storages
        self.at = None

    def release(self) -> None:
        """Hold no parameter any more."""
        self._kept, self._distinct = [], []
        for block in self.blocks:
            block.release()

    def _unfrozen(self) -> Iterator[tuple[Block, Sequence[Storage], list[Storage]]]:
        """Each block that is not frozen, its storages, and those of them with a leaf that is not."""
        for block, storages in self._each():
            mine = [storage for storage in storages if any(leaf.requires_grad for leaf in storage.leaves)]
            if mine:
                yield block, storages, mine

    def _trained(self, step: Step) -> Iterator[tuple[Block, Sequence[Storage], list[Storage]]]:
        """Each block that this step trains, its storages, and those of them that it trains."""
        for block, storages in self._each():
            mine = [storage for storage in storages if any(id(leaf) in step.trained for leaf in storage.leaves)]
            if mine:
                yield block, storages, mine

    def _samples(self) -> Iterator[Tensor]:
        """Ones, then zeros, in the place of a block, for each shape and dtype; on the CPU where there is no memory."""
        seen = set()
        for block, storages in self._each():
            w = block.weight(storages)
            device = torch.device("cpu") if w.is_meta else w.device
            if (key := (w.shape, w.dtype, device)) not in seen:
                seen.add(key)
                yield torch.ones_like(w, device=device)
                yield torch.zeros_like(w, device=device)

    def _expect(self, method: str, result: object, shape: tuple[int, ...]) -> None:
        kind = type(self.binding.kind)
        whose = f"rule {self.binding.key!r}: {method} of {kind.__module__}.{kind.__qualname__} returns"
        # A wrong shape would be broadcast, and change every weight without a word.
        if not isinstance(result, Tensor) or tuple(result.shape) != shape or not result.is_floating_point():
            got = f"{result.dtype} {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
            raise PluginError(f"{whose} {got}, not a floating-point tensor of shape {shape}")
        if not bool(result.isfinite().all()):
            raise PluginError(f"{whose} NaN or infinity for a weight of ones or zeros")


@dataclass(eq=False)
class PenaltyRule(WeightRule):
    """A penalty on weights. The ledger is of one via the loss."""

    ledger: Ledger = field(default_factory=Ledger)

    def prove(self) -> None:
        for w in self._samples():
            self._expect("value", self.penalty.value(w), ())
            self._expect("gradient", self.penalty.gradient(w), tuple(w.shape))
            if self.binding.via == "proximal":
                self._expect("prox", self.penalty.prox(w, 0.1), tuple(w.shape))
        if self.binding.via in ("proximal", "decoupled"):
            for block, storages in self._each():
                w = block.weight(storages)
                if not w.is_meta:
                    for storage in storages:
                        block.prove(storage, [w * 0.5])

    @property
    def penalty(self) -> Penalty:
        """Its kind."""
        kind = self.binding.kind
        assert isinstance(kind, Penalty)
        return kind

    def amount(self, index: int) -> float:
        """strength · factor at a step."""
        return self.penalty.strength * self.binding.factor(index)

    def value(self, index: int) -> Tensor | None:
        """strength · factor · Σ Ω over the blocks that are not frozen, None where all are.  -> ()."""
        total = self._sum((block, storages) for block, storages, _ in self._unfrozen())
        return None if total is None else total * self.amount(index)

    def _sum(self, live: Iterable[tuple[Block, Sequence[Storage]]]) -> Tensor | None:
        total: Tensor | None = None
        for block, storages in live:
            value = self.penalty.value(block.weight(storages))
            total = value if total is None else total + value.to(total.device)
        return total

    def trained_value(self, step: Step) -> Tensor | None:
        """The same over the blocks that this step trains."""
        total = self._sum((block, storages) for block, storages, _ in self._trained(step))
        return None if total is None else total * self.amount(step.index)

    def check(self, step: Step) -> None:
        """Raise StepError where a proximal or decoupled rule cannot act in this step, before anything is changed."""
        for _, _, mine in self._trained(step):
            if isinstance(step.optimizer, LBFGS) or step.evaluations > 1:
                raise StepError(
                    f"rule {self.binding.key!r} is {self.binding.via}, which needs a single gradient evaluation per "
                    f"step; {step.by} evaluates its closure several times. Use via gradient"
                )
            # A decoupled rule decays each of two biases at its own rate; behind one weight there can be but one.
            for together in [mine] if self.binding.via == "proximal" else [[storage] for storage in mine]:
                first, *others = [_lr(step, leaf) for leaf in _leaves(step, together)]
                if any(bool(other != first) for other in others):
                    raise StepError(
                        f"rule {self.binding.key!r} is {self.binding.via}, but what makes up one weight has different "
                        "learning rates"
                    )

    def add_gradient(self, step: Step) -> None:
        """grad += strength · factor · ∇Ω(w), times the scale that the gradients have."""
        amount = self.amount(step.index)
        if amount == 0:
            return
        for block, storages, mine in self._trained(step):
            gradient = self.penalty.gradient(block.weight(storages))
            if step.scale is not None:
                gradient = gradient * step.scale.to(gradient.device)
            for storage in mine:
                storage.add(block.view, gradient, list(_signed(step, storage, amount)))

    def decay(self, step: Step) -> None:
        """w −= lr · strength · factor · ∇Ω(w), before the update, as torch's AdamW."""
        amount = self.amount(step.index)
        if amount == 0:
            return
        for block, storages, mine in self._trained(step):
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
        for block, storages, mine in self._trained(step):
            size = _lr(step, _leaves(step, mine)[0]) * amount * len(mine)
            block.move(storages, mine, self.penalty.prox(block.weight(storages), size))


def _leaves(step: Step, mine: Sequence[Storage]) -> list[nn.Parameter]:
    """The leaves that this step trains."""
    return [leaf for storage in mine for leaf in storage.leaves if id(leaf) in step.trained]


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
        for block, storages in self._each():
            w = block.weight(storages)
            if not w.is_meta:
                # One of the points is far outside, so that the projection is sure to move it.
                points = [constraint.project(w), constraint.project(w * 1e3)]
                for storage in storages:
                    block.prove(storage, points)

    def at_step(self, index: int) -> Constraint:
        """The constraint, its bound scaled as the schedule says."""
        kind = self.binding.kind
        assert isinstance(kind, Constraint)
        return kind if self.binding.schedule is None else kind.at(self.binding.factor(index))

    def project(self, step: Step) -> None:
        """Project the blocks that this step trains, if it is the N-th or if the N-th did not train them."""
        if (step.index + 1) % self.binding.every == 0 and step.index != self._called:
            self._called = step.index  # once, though several optimizers may take one step together
            self.due = set(self.blocks)
        if not self.due:
            return
        constraint = self.at_step(step.index)
        for block, storages, mine in self._trained(step):
            if block in self.due:
                block.move(storages, mine, constraint.project(block.weight(storages)))
                self.due.discard(block)

    def restore(self, count: int, due: Iterable[str]) -> None:
        """Go on after `count` steps, with the blocks of these names waiting."""
        names = set(due)
        self._called, self.due = count - 1, {block for block in self.blocks if block.name in names}

    def project_all(self, index: int) -> None:
        """Project every block that is not frozen."""
        constraint = self.at_step(index)
        for block, storages, mine in self._unfrozen():
            block.move(storages, mine, constraint.project(block.weight(storages)))

    def violation(self, index: int) -> Tensor:
        """The largest violation over its blocks.  -> ()."""
        constraint = self.at_step(index)
        found = [constraint.violation(block.weight(storages)) for block, storages in self._each()]
        return torch.stack([one.to(found[0].device) for one in found]).amax()
