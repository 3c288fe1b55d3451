"""Blocks that a kind takes many at a time, through its list forms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import compress

import torch
from torch import Tensor, nn

from regkit.blocks import Block
from regkit.kinds import Constraint, Penalty
from regkit.storage import Plain, Storage, grad_of

Acts = Callable[[nn.Parameter], bool]
"""Whether something is to be done to a parameter."""


@dataclass(eq=False)
class Batch:
    """Blocks of plain parameters on one device and of one dtype, which do not overlap."""

    blocks: list[Block] = field(default_factory=list)
    parameters: list[nn.Parameter] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What it is, for a sentence."""
        first, *others = self.blocks
        return f"{first.name} and {len(others)} more" if others else first.name

    def holds(self) -> bool:
        """Whether they are of one device and dtype still: `model.to()` leaves a parameter the object that it is."""
        dtype, device = self.parameters[0].dtype, self.parameters[0].get_device()
        return all(one.dtype is dtype and one.get_device() == device for one in self.parameters)

    def where(self, acts: Acts) -> Batch:
        """Those blocks of it whose parameter something is to be done to."""
        return self._these([acts(one) for one in self.parameters])

    def among(self, blocks: set[Block]) -> Batch:
        """Those of it that are among these."""
        return self._these([one in blocks for one in self.blocks])

    def _these(self, taken: list[bool]) -> Batch:
        if all(taken):
            return self
        return Batch(list(compress(self.blocks, taken)), list(compress(self.parameters, taken)))

    def weights(self) -> list[Tensor]:
        """Live views of the weights."""
        return [block.view(one) for block, one in zip(self.blocks, self.parameters, strict=True)]

    def gradients(self) -> list[Tensor]:
        """Live views of their gradients, which must be there."""
        return [block.view(grad_of(one)) for block, one in zip(self.blocks, self.parameters, strict=True)]


def batched(live: Iterable[tuple[Block, Sequence[Storage]]]) -> list[Batch]:
    """Those of the blocks that list forms may take."""
    batches: dict[tuple[torch.dtype, torch.device], Batch] = {}
    sharing: dict[nn.Parameter, list[Block]] = {}
    for block, storages in live:
        if len(storages) == 1 and type(storages[0]) is Plain:
            sharing.setdefault(storages[0].leaves[0], []).append(block)
    for parameter, blocks in sharing.items():
        if not _overlapping(parameter, blocks):
            batch = batches.setdefault((parameter.dtype, parameter.device), Batch())
            batch.blocks += blocks
            batch.parameters += [parameter] * len(blocks)
    return list(batches.values())


def _overlapping(parameter: nn.Parameter, blocks: Sequence[Block]) -> bool:
    """Whether any two of its blocks have numbers in common: adapters may differ in how they see a shared one."""
    if len(blocks) == 1:
        return False
    seen = torch.zeros(parameter.shape, dtype=torch.int8)
    for block in blocks:
        block.view(seen).add_(1)
    return bool((seen > 1).any())


LOOPS = {"values": "value", "add_gradients": "gradient", "project_": "project"}
"""What each list form is a list form of."""


def own_forms(kind: Penalty | Constraint) -> set[str]:
    """The list forms that the kind's class has of its own."""
    base = Penalty if isinstance(kind, Penalty) else Constraint
    return {form for form in LOOPS if hasattr(base, form) and getattr(type(kind), form) is not getattr(base, form)}


def samples(batch: Batch) -> list[Tensor]:
    """Ones, zeros and ramps up to 1 and 100, of each shape among its weights but for sizes above 8, which are cut."""
    found: list[Tensor] = []
    small = (w[(slice(8),) * w.dim()] for w in batch.weights())
    for w in {w.shape: w for w in small}.values():
        like = torch.ones_like(w, device="cpu" if w.is_meta else None)
        ramp = torch.linspace(-1, 1, like.numel(), dtype=like.dtype, device=like.device).view(like.shape)
        found += [like, torch.zeros_like(like), ramp, 100 * ramp]
    return found


Compared = Iterator[tuple[str, Sequence[Tensor], Sequence[Tensor]]]
"""Each list form that a kind has of its own, what comes of it, and what comes of the loop."""


def compare_penalty(penalty: Penalty, weights: list[Tensor], by_loss: bool) -> Compared:
    """The list forms of a penalty at these weights; by_loss: with the gradient that autograd makes of `values`."""
    own, kept = own_forms(penalty), [w.clone() for w in weights]
    if "values" in own:
        yield "values", [penalty.values(list(weights))], [Penalty.values(penalty, kept)]
        if by_loss:
            with torch.enable_grad():
                leaves = [w.clone().requires_grad_() for w in weights]
                slopes = torch.autograd.grad(penalty.values(leaves), leaves)
                yield "values", slopes, torch.autograd.grad(Penalty.values(penalty, leaves), leaves)
        yield "values", weights, kept
    if "add_gradients" in own:
        ours, wanted = ([torch.ones_like(w) for w in weights] for _ in range(2))
        penalty.add_gradients(list(weights), list(ours), 0.3)
        Penalty.add_gradients(penalty, kept, wanted, 0.3)
        yield "add_gradients", ours, wanted
        yield "add_gradients", weights, kept


def compare_constraint(constraint: Constraint, weights: list[Tensor]) -> Compared:
    """The list form of a constraint at these weights."""
    if "project_" in own_forms(constraint):
        ours = [w.clone() for w in weights]
        constraint.project_(list(ours))
        yield "project_", ours, [constraint.project(w) for w in weights]
