"""What one step does to weights: gradients, decay, proximal operators, projections, on live blocks of parameters.

Nothing here is decided: a rule's kind, its sites and its factor come from the plan and the step.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import LBFGS

from regkit.binding import Binding
from regkit.errors import AttachError, PluginError, StepError
from regkit.kinds import Constraint, Layout, Penalty
from regkit.ledger import Ledger
from regkit.sites import WeightSite
from regkit.steps import Step


class Block:
    """A site on the live model. The module is held weakly, and its parameters are looked up at each use: they may be
    replaced (`load_state_dict(assign=True)`, `to_empty`), and an attachment keeps no model alive.
    """

    def __init__(self, site: WeightSite, module: nn.Module, layout: Layout) -> None:
        self.site = site
        self._module = weakref.ref(module)
        self._layout = layout
        self._whole = site.gate is None

    def parameters(self) -> list[nn.Parameter]:
        """The parameters as they are now."""
        module = self._module()
        if module is None:
            raise AttachError(f"the module {self.site.name!r} is gone")
        found = [module._parameters.get(name) for name in self.site.parameters]
        kept = [parameter for parameter in found if parameter is not None]
        if len(kept) < len(found):
            raise AttachError(f"{self.site.name}.{' + '.join(self.site.parameters)} is not a plain parameter any more")
        return kept

    def rows(self, tensor: Tensor) -> Tensor:
        """A view of the block's rows in a parameter or its gradient, in the layout that the kind asked for."""
        block = tensor if self._whole else tensor.narrow(0, self.site.start, self.site.rows)
        return torch.unflatten(block, 0, (self.site.gates, -1)) if self._layout == "cell" else block

    def weight(self, parameters: Sequence[Tensor]) -> Tensor:
        """The weight that acts: a view of the one parameter, or the sum of two biases."""
        first = self.rows(parameters[0])
        return first if len(parameters) == 1 else first + self.rows(parameters[1])

    def move(self, parameters: Sequence[Tensor], mine: Sequence[Tensor], point: Tensor) -> None:
        """Make the weight that acts equal to a point, by changing the parameters in `mine`.

        For a sum a + b the change is shared equally, which is the nearest pair: ‖Δa‖² + ‖Δb‖² is least under a given
        Δa + Δb where Δa = Δb.
        """
        if len(parameters) == 1:
            self.rows(parameters[0]).copy_(point)
            return
        share = (point - self.weight(parameters)) / len(mine)
        for parameter in mine:
            self.rows(parameter).add_(share)


def _lr(step: Step, parameter: Tensor) -> float | Tensor:
    group = step.groups[id(parameter)]
    if "lr" not in group:
        raise StepError(f"{type(step.optimizer).__name__} has no `lr`, which a proximal or decoupled rule multiplies")
    lr: float | Tensor = group["lr"]
    return lr


@dataclass(eq=False)
class WeightRule(ABC):
    """A rule on weights, with its live blocks."""

    binding: Binding
    blocks: list[Block]

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter that it acts on."""
        for block in self.blocks:
            yield from block.parameters()

    @abstractmethod
    def prove(self) -> None:
        """Raise PluginError unless the kind returns what its contract says, on a block of each shape."""

    def trained_by(self, step: Step) -> set[int]:
        """The ids of its parameters that this step trains."""
        return {id(parameter) for parameter in self.parameters()} & step.trained

    def _samples(self) -> Iterator[Tensor]:
        """Ones in the place of a block, for each shape, dtype and device."""
        seen = set()
        for block in self.blocks:
            w = block.weight(block.parameters())
            if (key := (w.shape, w.dtype, w.device)) not in seen:
                seen.add(key)
                yield torch.ones_like(w)

    def _expect(self, method: str, result: object, shape: tuple[int, ...]) -> None:
        # A wrong shape would be broadcast, and change every weight without a word.
        if isinstance(result, Tensor) and tuple(result.shape) == shape and result.is_floating_point():
            return
        got = f"{result.dtype} {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
        kind = type(self.binding.kind)
        raise PluginError(
            f"rule {self.binding.key!r}: {method} of {kind.__module__}.{kind.__qualname__} returns {got}, not a "
            f"floating-point tensor of shape {shape}"
        )

    def _trained(self, step: Step) -> Iterator[tuple[Block, list[nn.Parameter], list[nn.Parameter]]]:
        """Each block that this step trains, all its parameters, and those of them that it trains."""
        for block in self.blocks:
            parameters = block.parameters()
            mine = [p for p in parameters if id(p) in step.trained]
            if mine:
                yield block, parameters, mine


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

    @property
    def penalty(self) -> Penalty:
        """Its kind."""
        kind = self.binding.kind
        assert isinstance(kind, Penalty)
        return kind

    def value(self, index: int) -> Tensor | None:
        """strength · factor · Σ Ω over the blocks that are not frozen, None where all are.  -> ()."""
        everything = [(block, block.parameters()) for block in self.blocks]
        total = self._sum((block, ps) for block, ps in everything if any(p.requires_grad for p in ps))
        return None if total is None else total * (self.penalty.strength * self.binding.factor(index))

    def _sum(self, live: Iterable[tuple[Block, Sequence[Tensor]]]) -> Tensor | None:
        total: Tensor | None = None
        for block, parameters in live:
            value = self.penalty.value(block.weight(parameters))
            total = value if total is None else total + value.to(total.device)
        return total

    def trained_value(self, step: Step) -> Tensor | None:
        """The same over the blocks that this step trains."""
        total = self._sum((block, parameters) for block, parameters, _ in self._trained(step))
        return None if total is None else total * (self.penalty.strength * self.binding.factor(step.index))

    def check(self, step: Step) -> None:
        """Raise StepError where a proximal or decoupled rule cannot act in this step, before anything is changed."""
        for _, _, mine in self._trained(step):
            if isinstance(step.optimizer, LBFGS) or step.evaluations > 1:
                raise StepError(
                    f"rule {self.binding.key!r} is {self.binding.via}, which needs a single gradient evaluation per "
                    f"step; {type(step.optimizer).__name__} evaluates its closure several times. Use via gradient"
                )
            first, *others = [_lr(step, parameter) for parameter in mine]
            if self.binding.via == "proximal" and any(bool(other != first) for other in others):
                raise StepError(f"rule {self.binding.key!r}: the two biases of a sum have different learning rates")

    def add_gradient(self, step: Step) -> None:
        """grad += strength · factor · ∇Ω(w), times the scale that the gradients have."""
        amount = self.penalty.strength * self.binding.factor(step.index)
        if amount == 0:
            return
        for block, parameters, mine in self._trained(step):
            gradient = self.penalty.gradient(block.weight(parameters))
            if step.scale is not None:
                gradient = gradient * step.scale.to(gradient.device)
            for parameter in mine:
                assert parameter.grad is not None  # or it would not be trained
                # An optimizer that maximizes turns the gradient around; the penalty is made small all the same.
                signed = -amount if step.groups[id(parameter)].get("maximize") else amount
                block.rows(parameter.grad).add_(gradient, alpha=signed)

    def decay(self, step: Step) -> None:
        """w −= lr · strength · factor · ∇Ω(w), before the update, as torch's AdamW."""
        amount = self.penalty.strength * self.binding.factor(step.index)
        if amount == 0:
            return
        for block, parameters, mine in self._trained(step):
            gradient = self.penalty.gradient(block.weight(parameters))
            for parameter in mine:
                block.rows(parameter).sub_(gradient * (_lr(step, parameter) * amount))

    def shrink(self, step: Step) -> None:
        """w = prox(w, lr · strength · factor), after the update.

        For a sum of n trained parameters the step counts n times: moving each by δ/n costs ½‖δ‖²/n.
        """
        amount = self.penalty.strength * self.binding.factor(step.index)
        if amount == 0:
            return
        for block, parameters, mine in self._trained(step):
            size = _lr(step, mine[0]) * amount * len(mine)
            block.move(parameters, mine, self.penalty.prox(block.weight(parameters), size))


class ConstraintRule(WeightRule):
    """A constraint on weights."""

    def prove(self) -> None:
        for w in self._samples():
            self._expect("project", self.at(0).project(w), tuple(w.shape))
            self._expect("violation", self.at(0).violation(w), ())

    def at(self, index: int) -> Constraint:
        """The constraint, its bound scaled as the schedule says."""
        kind = self.binding.kind
        assert isinstance(kind, Constraint)
        return kind if self.binding.schedule is None else kind.at(self.binding.factor(index))

    def project(self, step: Step) -> None:
        """Project the blocks that this step trains."""
        constraint = self.at(step.index)
        for block, parameters, mine in self._trained(step):
            block.move(parameters, mine, constraint.project(block.weight(parameters)))

    def project_all(self, index: int) -> None:
        """Project every block that is not frozen."""
        constraint = self.at(index)
        for block in self.blocks:
            parameters = block.parameters()
            mine = [p for p in parameters if p.requires_grad]
            if mine:
                block.move(parameters, mine, constraint.project(block.weight(parameters)))

    def violation(self, index: int) -> Tensor:
        """The largest violation over its blocks.  -> ()."""
        constraint = self.at(index)
        found = [constraint.violation(block.weight(block.parameters())) for block in self.blocks]
        return torch.stack([one.to(found[0].device) for one in found]).amax()
