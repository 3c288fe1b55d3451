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
from regkit.buckets import buckets
from regkit.kinds import Constraint, Penalty
from regkit.runtime.sharding import divided, held_here, local, placement, pooled
from regkit.weights.block import Block
from regkit.weights.storage import Plain, Sharded, Storage

Kept = tuple[Block, Sequence[Storage]]
"""A block and its storages."""

Pick = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""Picks a batch's gradients from a list of the gradients of a step's parameters."""


@dataclass(eq=False)
class Batch:
    """Blocks of plain parameters on one device and of one dtype, which do not overlap.

    parameters: the parameter of each block.
    """

    blocks: list[Block] = field(default_factory=list)
    parameters: list[nn.Parameter] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The batch's name for a sentence."""
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
        """Whether each block is a whole parameter, of which no view is needed."""
        return all(block.as_kept for block in self.blocks)

    @cached_property
    def _rows(self) -> tuple[list[int], list[int], list[int]] | None:
        """The units of each weight, and the start and number of each block's rows; None unless all blocks are rows."""
        if not all(block.rows for block in self.blocks):
            return None
        sites = [block.site for block in self.blocks]
        return [one.units for one in sites], [one.start for one in sites], [one.rows for one in sites]

    def restrict_to_parameters(self, ids: frozenset[int]) -> Batch:
        """Restrict the batch to blocks of parameters with ids in `ids`."""
        return self if self.ids <= ids else self._restricted([id(one) in ids for one in self.parameters])

    def restrict_to_blocks(self, blocks: set[Block]) -> Batch:
        """Restrict the batch to blocks in `blocks`."""
        return self if self.members <= blocks else self._restricted([one in blocks for one in self.blocks])

    def _restricted(self, selected: list[bool]) -> Batch:
        return type(self)(list(compress(self.blocks, selected)), list(compress(self.parameters, selected)))

    def outlines(self) -> list[Tensor]:
        """Tensors of the shapes of whole blocks, with any numbers, which every process has."""
        return self.views(self.parameters)

    def views(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Views of the blocks in their parameters, or in the gradients; made anew, as `.data` may be replaced."""
        if self.whole:
            return [*tensors]
        rows = self._rows
        if rows is not None and list(map(Tensor.size, tensors, repeat(0))) == rows[0]:
            return list(map(torch.narrow, tensors, repeat(0), rows[1], rows[2]))
        return [block.view(one) for block, one in zip(self.blocks, tensors, strict=True)]

    def each(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each parameter, with the live view of its block."""
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
        together, large = buckets(weights)
        for bucket in (*together, *([one] for one in large)):
            # A gradient that is too small for half precision may fit once it is scaled.
            wide = [at_least_float32(weights[index]) for index in bucket]
            slopes = [torch.zeros_like(w) for w in wide]
            penalty.add_gradients(wide, list(slopes), amount)
            torch._foreach_mul_(slopes, scale)
            torch._foreach_add_([gradients[index] for index in bucket], slopes)

    def picked(self, numbers: Mapping[int, int]) -> Pick:
        """A function that picks the batch's gradients from a list. numbers: each parameter's place there, by id."""
        places = [numbers[id(one)] for one in self.parameters]
        if len(places) == 1:
            return itemgetter(slice(places[0], places[0] + 1))
        return list if len(places) == len(numbers) and places == list(range(len(numbers))) else itemgetter(*places)


@dataclass(eq=False)
class Shards(Batch):
    """Parts that this process holds, of blocks of sharded parameters that are placed alike on one mesh.

    The kind needs no more than these parts, or sums over the parts of all processes.
    """

    @cached_property
    def whole(self) -> bool:
        return False

    @cached_property
    def _local_rows(self) -> list[tuple[int, int]]:
        """The start and number of each block's rows in the part of its parameter that this process holds."""
        rows = []
        for block, parameter in zip(self.blocks, self.parameters, strict=True):
            held = held_here(parameter)
            assert held is not None  # or the block would be in another batch
            offset, count = held[0]
            first = 0 if block.as_kept else block.site.start - offset
            last = count if block.as_kept else first + block.site.rows
            start = min(max(first, 0), count)
            rows.append((start, max(min(last, count) - start, 0)))
        return rows

    def outlines(self) -> list[Tensor]:
        pairs = zip(self.blocks, self.parameters, strict=True)
        return [local(parameter).new_empty(block.site.shape) for block, parameter in pairs]

    def parts(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Views of the parts that this process holds, of weights or gradients; empty where the process holds none."""
        return [local(one).narrow(0, start, rows) for one, (start, rows) in zip(tensors, self._local_rows, strict=True)]

    def views(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [one for one in self.parts(tensors) if one.numel()]

    def each(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        pairs = zip(self.parameters, self.parts(self.parameters), strict=True)
        return ((parameter, part) for parameter, part in pairs if part.numel())

    def lie_alike(self, gradients: Sequence[Tensor]) -> bool:
        """Whether the gradients are placed as the parameters are."""
        return list(map(_placements, gradients)) == list(map(_placements, self.parameters))

    def value(self, penalty: Penalty) -> Tensor:
        weights = self.views(self.parameters)
        return self._combined(penalty.values(weights) if weights else None, "sum")

    def violation(self, constraint: Constraint) -> Tensor:
        found = self._violations(constraint)
        return self._combined(torch.stack(found).amax() if found else None, "max")

    def _violations(self, constraint: Constraint) -> list[Tensor]:
        """The violation of each part that this process holds."""
        return [constraint.violation(w) for w in self.views(self.parameters)]

    def _combined(self, part: Tensor | None, by: Literal["sum", "max"]) -> Tensor:
        """The sum or maximum of a scalar over the processes; None, of a process without parts, counts as 0.  -> ()."""
        like = self.parameters[0]
        dtype = torch.promote_types(like.dtype, torch.float32)
        # Empty parts, too, are functions of the parameter: a value is part of the loss of every process.
        own = local(like).narrow(0, 0, 0).sum(dtype=dtype) if part is None else part.to(dtype)
        (whole,) = pooled([own], like, range(like.dim()), by)
        return whole


@dataclass(eq=False)
class PooledShards(Shards):
    """Shards for a constraint that needs, of other processes' parts, only sums."""

    def _with_sums(self, constraint: Constraint) -> Iterator[tuple[Tensor, Tensor]]:
        """This process' part of each block, as a matrix, with the whole block's sums. One all-reduce for all blocks."""
        parts = [one if one.dim() > 1 else one.unsqueeze(-1) for one in self.parts(self.parameters)]
        sums = pooled([constraint.sums(part) for part in parts], self.parameters[0], constraint.pooled or (), "sum")
        return zip(parts, sums, strict=True)

    def project(self, constraint: Constraint) -> None:
        for part, sums in self._with_sums(constraint):
            part.copy_(constraint.project_given(part, sums))

    def _violations(self, constraint: Constraint) -> list[Tensor]:
        return [constraint.violation_given(part, sums) for part, sums in self._with_sums(constraint) if part.numel()]


_placements = attrgetter("placements")


class Placed(NamedTuple):
    """The blocks of a rule in a snapshot, each tied block once."""

    batches: list[Batch]
    """Batches of blocks that are live views of parameters, or of local shards."""

    lone: list[Kept]
    """The other blocks, which are read and written one by one."""

    number: int
    """The number of blocks."""

    @classmethod
    def of(cls, distinct: list[Kept], kind: Penalty | Constraint) -> Placed:
        """Sort blocks by their storage; a batch has many blocks only if the kind has list forms of its own."""
        batches = list(_batched(distinct, kind))
        live = {block for batch in batches for block in batch.blocks}
        return cls(batches, [one for one in distinct if one[0] not in live], len(distinct))


LOOPS: Final = {"values": "value", "add_gradients": "gradient", "project_": "project"}
"""The method that each list form is the list form of."""


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
            # A kind without list forms is called for each block, so that its errors can name the block.
            own = () if together else (block,)
            batch = batches.setdefault((make, *key, *where, *own), make())
            batch.blocks.append(block)
            batch.parameters.append(parameter)
    return iter(batches.values())


def _batch_for(kind: Penalty | Constraint, block: Block, storage: Storage) -> type[Batch] | None:
    """The type of batch for a block; None where the kind must be given the whole weight, made for the purpose."""
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
    """Whether any two blocks of a parameter overlap: adapters may see a shared parameter differently."""
    seen = torch.zeros(parameter.shape, dtype=torch.int8)
    for block in blocks:
        block.view(seen).add_(1)
    return bool((seen > 1).any())
