"""Blocks that a kind takes many at a time, as live views of their parameters."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import compress, repeat
from operator import attrgetter, itemgetter
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor, nn

from regkit.activity import at_least_float32
from regkit.buckets import buckets, room
from regkit.kinds import Constraint, Penalty
from regkit.runtime.sharding import divided, held_here, local, placement, pooled
from regkit.weights.block import Block
from regkit.weights.storage import Plain, Sharded, Storage

Kept = tuple[Block, Sequence[Storage]]
"""A block, and where it is kept."""

Pick = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""Picks the gradients of a batch out of those of a step's parameters."""


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
    def whole(self) -> bool:
        """Whether each block is a whole parameter as it is kept: then no view is needed."""
        return all(block.as_kept for block in self.blocks)

    @cached_property
    def _rows(self) -> tuple[list[int], list[int], list[int]] | None:
        """Where all blocks are rows: their units, where they start, how many they are."""
        if not all(block.rows for block in self.blocks):
            return None
        sites = [block.site for block in self.blocks]
        return [one.units for one in sites], [one.start for one in sites], [one.rows for one in sites]

    def restrict_to_parameters(self, ids: frozenset[int]) -> Batch:
        """Those blocks of it whose parameters have these ids."""
        return self if self.ids <= ids else self._restricted([id(one) in ids for one in self.parameters])

    def restrict_to_blocks(self, blocks: set[Block]) -> Batch:
        """Those of it that are among these."""
        return self if self.members <= blocks else self._restricted([one in blocks for one in self.blocks])

    def _restricted(self, taken: list[bool]) -> Batch:
        return type(self)(list(compress(self.blocks, taken)), list(compress(self.parameters, taken)))

    def outlines(self) -> list[Tensor]:
        """Tensors of the shapes of whole blocks, which every process has, whatever is in them."""
        return self.views(self.parameters)

    def views(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Views of the blocks in their weights, or in the gradients of these. Made anew, for `.data` may be another."""
        if self.whole:
            return [*tensors]
        rows = self._rows
        if rows is not None and list(map(Tensor.size, tensors, repeat(0))) == rows[0]:
            return list(map(torch.narrow, tensors, repeat(0), rows[1], rows[2]))
        return [block.view(one) for block, one in zip(self.blocks, tensors, strict=True)]

    def each(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each parameter, and the live view of its block."""
        return zip(self.parameters, self.views(self.parameters), strict=True)

    def value(self, penalty: Penalty) -> Tensor:
        """The sum of a penalty's values at unit strength.  -> ()."""
        return penalty.values(self.views(self.parameters))

    def project(self, constraint: Constraint) -> None:
        """Project each block, in place."""
        weights: list[Tensor] = [*self.parameters] if self.whole else self.views(self.parameters)
        if weights:
            constraint.project_(weights)

    def violation(self, constraint: Constraint) -> Tensor:
        """The largest violation.  -> ()."""
        return torch.stack([constraint.violation(w) for w in self.views(self.parameters)]).amax()

    def add_scaled(self, penalty: Penalty, gradients: list[Tensor], amount: float, scale: Tensor) -> None:
        """gradients += scale · amount · ∇Ω(w).  scale: () or (1,), not to be waited for."""
        scale = scale.to(self.parameters[0].device).reshape(())
        weights = self.views(self.parameters)
        together, large = buckets(weights, room(weights[0]))
        for bucket in (*together, *([one] for one in large)):
            # What is small in half precision may be large enough once it is scaled.
            wide = [at_least_float32(weights[index]) for index in bucket]
            slopes = [torch.zeros_like(w) for w in wide]
            penalty.add_gradients(wide, list(slopes), amount)
            torch._foreach_mul_(slopes, scale)
            torch._foreach_add_([gradients[index] for index in bucket], slopes)

    def picked(self, numbers: Mapping[int, int]) -> Pick:
        """What picks the gradients of its parameters out of a list in which each has this number, by its id."""
        mine = [numbers[id(one)] for one in self.parameters]
        if len(mine) == 1:
            return itemgetter(slice(mine[0], mine[0] + 1))
        return list if len(mine) == len(numbers) and mine == list(range(len(numbers))) else itemgetter(*mine)


@dataclass(eq=False)
class Shards(Batch):
    """The parts that this process holds of blocks of sharded parameters, which are placed alike on one mesh.

    The kind needs to see no more than that, or sums over it.
    """

    @cached_property
    def whole(self) -> bool:
        return False

    @cached_property
    def _held(self) -> list[tuple[int, int]]:
        """The rows of each block in what is held of its parameter: where they start, how many they are."""
        found = []
        for block, parameter in zip(self.blocks, self.parameters, strict=True):
            held = held_here(parameter)
            assert held is not None  # or it would be in no such batch
            offset, count = held[0]
            first = 0 if block.as_kept else block.site.start - offset
            last = count if block.as_kept else first + block.site.rows
            start = min(max(first, 0), count)
            found.append((start, max(min(last, count) - start, 0)))
        return found

    def outlines(self) -> list[Tensor]:
        pairs = zip(self.blocks, self.parameters, strict=True)
        return [local(parameter).new_empty(block.site.shape) for block, parameter in pairs]

    def parts(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Views of what is held of each block in its weight, or in its gradient: of nothing, too."""
        return [local(one).narrow(0, start, rows) for one, (start, rows) in zip(tensors, self._held, strict=True)]

    def views(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [one for one in self.parts(tensors) if one.numel()]

    def each(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        pairs = zip(self.parameters, self.parts(self.parameters), strict=True)
        return ((parameter, part) for parameter, part in pairs if part.numel())

    def lie_alike(self, gradients: Sequence[Tensor]) -> bool:
        """Whether gradients are held as the parameters are."""
        return list(map(_placements, gradients)) == list(map(_placements, self.parameters))

    def value(self, penalty: Penalty) -> Tensor:
        weights = self.views(self.parameters)
        return self._combined(penalty.values(weights) if weights else None, "sum")

    def violation(self, constraint: Constraint) -> Tensor:
        found = [constraint.violation(w) for w in self.views(self.parameters)]
        return self._combined(torch.stack(found).amax() if found else None, "max")

    def _combined(self, part: Tensor | None, by: Literal["sum", "max"]) -> Tensor:
        """The sum, or the largest, of what processes have of a scalar; None of nothing, which is 0.  -> ()."""
        like = self.parameters[0]
        dtype = torch.promote_types(like.dtype, torch.float32)
        # Nothing, too, is a function of the parameter: a value is part of the loss of every process.
        mine = local(like).narrow(0, 0, 0).sum(dtype=dtype) if part is None else part.to(dtype)
        (whole,) = pooled([mine], like, range(like.dim()), by)
        return whole


@dataclass(eq=False)
class PooledShards(Shards):
    """Shards for a constraint to which sums over the whole weight say all that it has to know of other processes'."""

    def _with_sums(self, constraint: Constraint) -> Iterator[tuple[Tensor, Tensor]]:
        """What is held of each block, as a matrix, and the sums of the whole block. One all-reduce for all."""
        parts = [one if one.dim() > 1 else one.unsqueeze(-1) for one in self.parts(self.parameters)]
        sums = pooled([constraint.sums(part) for part in parts], self.parameters[0], constraint.pooled or (), "sum")
        return zip(parts, sums, strict=True)

    def project(self, constraint: Constraint) -> None:
        for part, sums in self._with_sums(constraint):
            part.copy_(constraint.project_given(part, sums))

    def violation(self, constraint: Constraint) -> Tensor:
        found = [constraint.violation_given(part, sums) for part, sums in self._with_sums(constraint) if part.numel()]
        return self._combined(torch.stack(found).amax() if found else None, "max")


_placements = attrgetter("placements")


class Placed(NamedTuple):
    """The blocks of a rule in a snapshot, what is tied once: those that are live views of parameters, and the rest."""

    batches: list[Batch]
    lone: list[Kept]
    number: int
    """How many blocks there are."""

    @classmethod
    def of(cls, distinct: list[Kept], kind: Penalty | Constraint) -> Placed:
        """Blocks by how they are kept: many are one batch of a kind with list forms of its own, each its own else."""
        batches = list(_batched(distinct, kind))
        live = {block for batch in batches for block in batch.blocks}
        return cls(batches, [one for one in distinct if one[0] not in live], len(distinct))


LOOPS: Final = {"values": "value", "add_gradients": "gradient", "project_": "project"}
"""Each list form, and the method of which it is one."""


def own_forms(kind: Penalty | Constraint) -> set[str]:
    """The list forms that the kind's class has of its own."""
    base = Penalty if isinstance(kind, Penalty) else Constraint
    return {form for form in LOOPS if hasattr(base, form) and getattr(type(kind), form) is not getattr(base, form)}


def _batched(distinct: Iterable[Kept], kind: Penalty | Constraint) -> Iterator[Batch]:
    batches: dict[Hashable, Batch] = {}
    sharing: dict[nn.Parameter, list[Block]] = {}
    makes: dict[nn.Parameter, type[Batch]] = {}
    together = bool(own_forms(kind))
    for block, storages in distinct:
        make = _batch_for(kind, block, storages[0]) if len(storages) == 1 else None
        if make is not None:
            parameter = storages[0].parameters[0]
            makes[parameter] = make
            sharing.setdefault(parameter, []).append(block)
    for parameter, blocks in sharing.items():
        if len(blocks) > 1 and _overlapping(parameter, blocks):
            continue
        make, key = makes[parameter], (parameter.dtype, parameter.device)
        where = () if make is Batch else placement(parameter)
        for block in blocks:
            # A kind without list forms is called for each block, and so an error of it can name that.
            own = () if together else (block,)
            batch = batches.setdefault((make, *key, *where, *own), make())
            batch.blocks.append(block)
            batch.parameters.append(parameter)
    return iter(batches.values())


def _batch_for(kind: Penalty | Constraint, block: Block, storage: Storage) -> type[Batch] | None:
    """The batch that takes a block; None where a kind has to be given the whole weight, made for it."""
    if type(storage) is Plain:
        return Batch
    if type(storage) is not Sharded or not (block.as_kept or block.rows):
        return None
    parameter = storage.parameters[0]
    fits = parameter.dim() == len(block.site.shape) and (block.as_kept or parameter.size(0) == block.site.units)
    if not fits or held_here(parameter) is None:
        return None
    if kind.separable == "elements" or (kind.separable == "rows" and divided(parameter) <= {0}):
        return Shards
    return PooledShards if isinstance(kind, Constraint) and kind.pooled is not None else None


def _overlapping(parameter: nn.Parameter, blocks: Sequence[Block]) -> bool:
    """Whether any two of its blocks have numbers in common: adapters may differ in how they see a shared one."""
    seen = torch.zeros(parameter.shape, dtype=torch.int8)
    for block in blocks:
        block.view(seen).add_(1)
    return bool((seen > 1).any())
