"""A rule on weights: where its blocks are kept now, which of them are taken together, and the trial of its kind."""

from __future__ import annotations

from abc import ABC
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from torch import nn

from regkit.kinds import Constraint, Penalty
from regkit.plan.binding import Binding
from regkit.weights.batch import Batch, Kept, Pick, Placed
from regkit.weights.block import Block
from regkit.weights.snapshot import Snapshot, Snapshots
from regkit.weights.storage import Storage

Live = tuple[Block, Sequence[Storage], list[Storage]]
"""A block, where it is kept, and those storages that have a parameter to act on."""

Part = TypeVar("Part", Batch, Kept, Live)


class Work(NamedTuple):
    """What a rule acts on where some parameters are trained: batches, with their gradients and signs, and the rest.

    A sign is -1 where the optimizer goes up the gradient. all: whether that is every block of the rule.
    """

    batches: list[tuple[Batch, Pick, int]]
    lone: list[Live]
    all: bool

    def parameter_ids(self) -> set[int]:
        """The ids of the parameters behind it."""
        return {key for batch, _, _ in self.batches for key in batch.ids}.union(
            id(leaf) for _, _, mine in self.lone for storage in mine for leaf in storage.parameters
        )

    def storages(self) -> set[Storage]:
        """The storages through which it reads and writes."""
        return {storage for _, _, mine in self.lone for storage in mine}


@dataclass(eq=False)
class WeightRule(ABC):
    """A rule on weights, with its live blocks. at: what of them it works on, for the sentence of an error.

    whose: where it is several rules in one, whose each block is: what is tied counts once for each of them.
    """

    binding: Binding
    blocks: list[Block]
    snapshots: Snapshots
    whose: Mapping[Block, str] = field(default_factory=dict)
    at: Block | Batch | None = field(default=None, init=False)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter that it acts on."""
        snapshot = self.snapshots.now()
        for block in self.blocks:
            for storage in snapshot.storages[block]:
                yield from storage.parameters

    def unfrozen(self) -> frozenset[int]:
        """The ids of its parameters that are not frozen."""
        return frozenset(id(parameter) for parameter in self.parameters() if parameter.requires_grad)

    # --- where its blocks are ----------------------------------------------------------------------------------------

    def placed(self, snapshot: Snapshot) -> Placed:
        """Its blocks in a snapshot. What has been tied since attach() counts once, too."""
        found = snapshot.placed.get(self)
        if found is None:
            first: dict[tuple[Hashable, ...], Kept] = {}
            for block in self.blocks:
                storages = snapshot.storages[block]
                first.setdefault((self.whose.get(block), *block.place(storages)), (block, storages))
            kind = self.binding.kind
            assert isinstance(kind, (Penalty, Constraint))
            found = snapshot.placed[self] = Placed.of(list(first.values()), kind)
        return found

    def work(
        self,
        snapshot: Snapshot,
        ids: frozenset[int],
        numbers: Mapping[int, int] | None = None,
        up: frozenset[int] = frozenset(),
    ) -> Work:
        """What these parameters make up.

        numbers: of the parameters of a step, by their ids, where gradients are to be picked. up: of those that their
        optimizer moves up the gradient.
        """
        placed = self.placed(snapshot)
        signed = ((1, ids - up), (-1, ids & up)) if up else ((1, ids),)
        batches = [
            (batch, batch.picked(numbers) if numbers else list, sign)
            for sign, some in signed
            for one in placed.batches
            if (batch := one.restrict_to_parameters(some)).blocks
        ]
        lone = [
            (block, storages, mine)
            for block, storages in placed.lone
            if (mine := [storage for storage in storages if any(id(leaf) in ids for leaf in storage.parameters)])
        ]
        complete = sum(len(batch.blocks) for batch, _, _ in batches) + len(lone) == placed.number
        return Work(batches, lone, complete)

    def each(self) -> Iterator[Kept]:
        """Each block with where it is kept now."""
        snapshot = self.snapshots.now()
        placed = self.placed(snapshot)
        live = ((block, snapshot.storages[block]) for batch in placed.batches for block in batch.blocks)
        return self.at_work((*live, *placed.lone))

    def at_work(self, parts: Iterable[Part]) -> Iterator[Part]:
        for part in parts:
            self.at = part if isinstance(part, Batch) else part[0]
            yield part
        self.at = None
