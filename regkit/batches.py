"""Blocks that a kind takes many at a time, through its list forms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn

from regkit.activity import at_least_float32
from regkit.blocks import Block
from regkit.buckets import buckets, room
from regkit.kinds import Constraint, Penalty
from regkit.storage import Plain, Storage, grad_of


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

    @cached_property
    def ids(self) -> frozenset[int]:
        """The ids of the parameters."""
        return frozenset(map(id, self.parameters))

    @cached_property
    def members(self) -> frozenset[Block]:
        """The blocks, as a set."""
        return frozenset(self.blocks)

    @cached_property
    def _whole(self) -> bool:
        """Whether each block is a whole parameter as it is kept: then no view is needed."""
        return all(block.as_kept for block in self.blocks)

    def holds(self) -> bool:
        """Whether they are of one device and dtype still: `model.to()` leaves a parameter the object that it is."""
        first, n = self.parameters[0], len(self.parameters)
        same = [one.dtype for one in self.parameters].count(first.dtype) == n
        return same and [one.get_device() for one in self.parameters].count(first.get_device()) == n

    def of(self, ids: frozenset[int]) -> Batch:
        """Those blocks of it whose parameters have these ids."""
        return self if self.ids <= ids else self._these([id(one) in ids for one in self.parameters])

    def among(self, blocks: set[Block]) -> Batch:
        """Those of it that are among these."""
        return self if self.members <= blocks else self._these([one in blocks for one in self.blocks])

    def _these(self, taken: list[bool]) -> Batch:
        return Batch(list(compress(self.blocks, taken)), list(compress(self.parameters, taken)))

    def weights(self) -> list[Tensor]:
        """Live views of the weights."""
        if self._whole:
            return [*self.parameters]
        return [block.view(one) for block, one in zip(self.blocks, self.parameters, strict=True)]

    def gradients(self) -> list[Tensor]:
        """Live views of their gradients, which must be there."""
        if self._whole:
            found: list[Any] = [one.grad for one in self.parameters]
            return found
        return [block.view(grad_of(one)) for block, one in zip(self.blocks, self.parameters, strict=True)]

    def picked(self, leaves: Sequence[nn.Parameter]) -> Callable[[list[Tensor]], list[Tensor]]:
        """What makes `gradients()` of those of these leaves, which must be of all of its parameters."""
        numbers = {id(leaf): number for number, leaf in enumerate(leaves)}
        mine = [numbers[id(one)] for one in self.parameters]
        if not self._whole:
            pairs = list(zip(self.blocks, mine, strict=True))
            return lambda found: [block.view(found[number]) for block, number in pairs]
        return list if mine == list(range(len(leaves))) else lambda found: [found[number] for number in mine]

    def add_gradients(self, penalty: Penalty, amount: float) -> None:
        """grad += amount · ∇Ω(w)."""
        penalty.add_gradients(self.weights(), self.gradients(), amount)

    def add_scaled(self, penalty: Penalty, amount: float, scale: Tensor) -> None:
        """grad += scale · amount · ∇Ω(w).  scale: () or (1,), not to be waited for."""
        scale = scale.to(self.parameters[0].device).reshape(())
        weights, gradients = self.weights(), self.gradients()
        together, large = buckets(weights, room(weights[0]))
        for bucket in (*together, *([one] for one in large)):
            # What is small in half precision may be large enough once it is scaled.
            wide = [at_least_float32(weights[index]) for index in bucket]
            slopes = [torch.zeros_like(w) for w in wide]
            penalty.add_gradients(wide, list(slopes), amount)
            torch._foreach_mul_(slopes, scale)
            torch._foreach_add_([gradients[index] for index in bucket], slopes)


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
