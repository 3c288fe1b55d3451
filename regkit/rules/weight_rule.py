"""A rule on weights: where its blocks are kept now, which of them are taken together, and the trial of its kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from regkit.errors import PluginError
from regkit.kinds import Constraint, Penalty
from regkit.plan.binding import Binding
from regkit.rules.trials import LOOPS, Compared, close, own_forms
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

    def leaves(self) -> set[int]:
        """The ids of the parameters behind it."""
        return {key for batch, _, _ in self.batches for key in batch.ids}.union(
            id(leaf) for _, _, mine in self.lone for storage in mine for leaf in storage.leaves
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
                yield from storage.leaves

    @abstractmethod
    def prove(self) -> None:
        """Raise PluginError unless the kind returns what its contract says, on a block of each shape.

        Raises AttachError where a weight is not finite, or cannot be written as the rule needs.
        """

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
            # A kind without list forms is called for each block, and so an error of it can name that.
            found = snapshot.placed[self] = Placed.of(list(first.values()), kind, together=bool(own_forms(kind)))
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
            if (batch := one.of(some)).blocks
        ]
        lone = [
            (block, storages, mine)
            for block, storages in placed.lone
            if (mine := [storage for storage in storages if any(id(leaf) in ids for leaf in storage.leaves)])
        ]
        complete = sum(len(batch.blocks) for batch, _, _ in batches) + len(lone) == placed.number
        return Work(batches, lone, complete)

    def _each(self) -> Iterator[Kept]:
        """Each block with where it is kept now."""
        snapshot = self.snapshots.now()
        placed = self.placed(snapshot)
        live = ((block, snapshot.storages[block]) for batch in placed.batches for block in batch.blocks)
        return self._at((*live, *placed.lone))

    def _at(self, parts: Iterable[Part]) -> Iterator[Part]:
        for part in parts:
            self.at = part if isinstance(part, Batch) else part[0]
            yield part
        self.at = None

    # --- the trial of its kind ---------------------------------------------------------------------------------------

    def trial(self) -> Hashable:
        """What `prove` tries: equal for rules of which one may stand for all; None for one that nothing stands for."""
        if self.placed(self.snapshots.now()).lone:
            return None
        weights = (block.weight(storages) for block, storages in self._each())
        looks = frozenset((w.shape, w.stride(), w.dtype, w.device) for w in weights)
        trial = self.binding.kind, self.binding.via, self.binding.schedule, looks
        try:
            hash(trial)
        except TypeError:  # an option is a list
            return None
        return trial

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

    def _prove_writable(self, points: Callable[[Tensor], Sequence[Tensor]]) -> None:
        """Raise AttachError where a weight cannot be brought to points like these. points: from the weight as it is."""
        for block, storages in self._at(self.placed(self.snapshots.now()).lone):
            for storage in storages:
                if storage.limited:
                    # Of a sum each half takes a share, which depends on the other: there, any other point will do.
                    w = block.weight(storages) if len(storages) == 1 else block.view(storage.read())
                    if not w.is_meta:
                        block.prove(storage, points(w) if len(storages) == 1 else [w * 0.5])

    def _expect(self, method: str, result: object, shape: tuple[int, ...]) -> None:
        kind = type(self.binding.kind)
        whose = f"rule {self.binding.key!r}: {method} of {kind.__module__}.{kind.__qualname__} returns"
        # A wrong shape would be broadcast, and change every weight without a word.
        if not isinstance(result, Tensor) or tuple(result.shape) != shape or not result.is_floating_point():
            got = f"{result.dtype} {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
            raise PluginError(f"{whose} {got}, not a floating-point tensor of shape {shape}")
        if not bool(result.isfinite().all()):
            raise PluginError(f"{whose} NaN or infinity for a weight of ones or zeros")

    def _agree(self, compared: Compared) -> None:
        kind = type(self.binding.kind)
        for form, ours, wanted in compared:
            for one, other in zip(ours, wanted, strict=True):
                if one.shape != other.shape or not close(one, other):
                    raise PluginError(
                        f"rule {self.binding.key!r}: {form} of {kind.__module__}.{kind.__qualname__} does not do what "
                        f"the loop over its {LOOPS[form]} does, for weights of shape {tuple(other.shape)}"
                    )
