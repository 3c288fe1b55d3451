"""Rules on weights: where a rule's blocks are kept now, which are taken together, and which a step acts on."""

from __future__ import annotations

from abc import ABC
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from torch import nn

from regkit.kinds import Constraint, Penalty
from regkit.plan.binding import Binding
from regkit.runtime.step import moves
from regkit.weights.batch import Batch, Kept, Pick, Placed
from regkit.weights.block import Block
from regkit.weights.snapshot import Snapshot, Snapshots
from regkit.weights.storage import Storage

Live = tuple[Block, Sequence[Storage], list[Storage]]
"""A block, the storages of its weight, and the storages that have a parameter to act on."""

Part = TypeVar("Part", Batch, Kept, Live)


class Work(NamedTuple):
    """The blocks that a rule acts on where certain parameters are trained.

    batches: with each, the function that picks its gradients, and a sign: -1 where the optimizer goes up the gradient.
    lone: the blocks that are in no batch.
    all: whether these are all blocks of the rule.
    """

    batches: list[tuple[Batch, Pick, int]]
    lone: list[Live]
    all: bool

    def parameter_ids(self) -> set[int]:
        """The ids of the parameters behind the blocks."""
        return {key for batch, _, _ in self.batches for key in batch.ids}.union(
            id(parameter) for _, _, acted_on in self.lone for storage in acted_on for parameter in storage.parameters
        )

    def storages(self) -> set[Storage]:
        """The storages through which the lone blocks are read and written."""
        return {storage for _, _, acted_on in self.lone for storage in acted_on}


@dataclass(eq=False)
class WeightRule(ABC):
    """A rule on weights, with its live blocks.

    kind: the binding's.
    rule_keys: of several rules made one, the key of the rule that each block is of: a tied weight counts once for each.
    at: the blocks being worked on, for the sentence of an error.
    """

    binding: Binding
    kind: Penalty | Constraint
    blocks: list[Block]
    snapshots: Snapshots
    rule_keys: Mapping[Block, str] = field(default_factory=dict)
    at: Block | Batch | None = field(default=None, init=False)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter that the rule acts on."""
        snapshot = self.snapshots.now()
        for block in self.blocks:
            for storage in snapshot.storages[block]:
                yield from storage.parameters

    def moving(self) -> frozenset[int]:
        """The ids of the rule's parameters that an optimizer may move: the others are frozen, and left alone."""
        return frozenset(id(parameter) for parameter in self.parameters() if moves(parameter))

    # --- where the blocks are ----------------------------------------------------------------------------------------

    def placed(self, snapshot: Snapshot) -> Placed:
        """The rule's blocks in a snapshot. Weights that have been tied since attach() count once, too."""
        found = snapshot.placed.get(self)
        if found is None:
            first: dict[tuple[Hashable, ...], Kept] = {}
            for block in self.blocks:
                storages = snapshot.storages[block]
                first.setdefault((self.rule_keys.get(block), *block.place(storages)), (block, storages))
            found = snapshot.placed[self] = Placed.of(list(first.values()), self.kind)
        return found

    def work(
        self,
        snapshot: Snapshot,
        ids: frozenset[int],
        numbers: Mapping[int, int] | None = None,
        up: frozenset[int] = frozenset(),
    ) -> Work:
        """The blocks to act on where the parameters of these ids are trained.

        numbers: of the parameters of a step, by their ids, where gradients are to be picked.
        up: the ids of the parameters that their optimizer moves up the gradient.
        """
        placed = self.placed(snapshot)
        signed = ((1, ids - up), (-1, ids & up)) if up else ((1, ids),)
        batches = [
            (batch, batch.picked(numbers) if numbers else list, sign)
            for sign, of_sign in signed
            for one in placed.batches
            if (batch := one.restrict_to_parameters(of_sign)).blocks
        ]
        lone = [
            (block, storages, acted_on)
            for block, storages in placed.lone
            if (acted_on := [one for one in storages if any(id(parameter) in ids for parameter in one.parameters)])
        ]
        complete = sum(len(batch.blocks) for batch, _, _ in batches) + len(lone) == placed.number
        return Work(batches, lone, complete)

    def each(self) -> Iterator[Kept]:
        """Each block, with the storages of its weight at present."""
        snapshot = self.snapshots.now()
        placed = self.placed(snapshot)
        live = ((block, snapshot.storages[block]) for batch in placed.batches for block in batch.blocks)
        return self.at_work((*live, *placed.lone))

    def at_work(self, parts: Iterable[Part]) -> Iterator[Part]:
        """The batches or blocks, each noted in `at` while the caller works on that one."""
        for part in parts:
            self.at = part if isinstance(part, Batch) else part[0]
            yield part
        self.at = None
