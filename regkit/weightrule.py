"""A rule on weights: where its blocks are kept now, which of them go through list forms, and the trial of its kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from regkit.batches import LOOPS, Batch, Compared, batched, own_forms
from regkit.binding import Binding
from regkit.blocks import Block
from regkit.census import Census
from regkit.errors import PluginError
from regkit.kinds import Constraint, Penalty
from regkit.step import Step
from regkit.storage import Storage

Kept = tuple[Block, Sequence[Storage]]
"""A block, and where it is kept."""

Live = tuple[Block, Sequence[Storage], list[Storage]]
"""The same, with those storages that have a leaf to act on."""

Part = TypeVar("Part", Batch, Kept, Live)


@dataclass(eq=False)
class WeightRule(ABC):
    """A rule on weights, with its live blocks. at: what of them it works on, for the sentence of an error.

    whose: where it is several rules in one, whose each block is: what is tied counts once for each of them.
    """

    binding: Binding
    blocks: list[Block]
    census: Census
    whose: Mapping[Block, str] = field(default_factory=dict)
    at: Block | Batch | None = field(default=None, init=False)
    _kept: list[Sequence[Storage]] = field(default_factory=list, init=False)
    _distinct: list[Kept] = field(default_factory=list, init=False)
    _batches: list[Batch] = field(default_factory=list, init=False)
    _lone: list[Kept] = field(default_factory=list, init=False)
    _version: int = field(default=-1, init=False)

    def __post_init__(self) -> None:
        kind = self.binding.kind
        assert isinstance(kind, (Penalty, Constraint))
        self._own = own_forms(kind)

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

    def unfrozen(self) -> frozenset[int]:
        """The ids of its parameters that are not frozen."""
        return frozenset(id(parameter) for parameter in self.parameters() if parameter.requires_grad)

    def release(self) -> None:
        """Hold no parameter any more."""
        self._kept, self._distinct, self._batches, self._lone, self._version = [], [], [], [], -1
        for block in self.blocks:
            block.release()

    # --- where its blocks are now ------------------------------------------------------------------------------------

    def _resolve(self) -> None:
        """Look up where each block is kept. What has been tied since attach() counts once, too."""
        hold = True
        for batch in self._batches:
            hold = hold and batch.holds()
        if hold and self._version == self.census.version:
            return
        kept = [block.storages() for block in self.blocks]
        self._version = self.census.version if all(block.steady for block in self.blocks) else -1
        if hold and kept == self._kept:
            return
        first: dict[tuple[Hashable, ...], Kept] = {}
        for block, storages in zip(self.blocks, kept, strict=True):
            first.setdefault((self.whose.get(block), *block.place(storages)), (block, storages))
        self._kept, self._distinct = kept, list(first.values())
        self._batches = batched(self._distinct) if self._own else []
        together = {block for batch in self._batches for block in batch.blocks}
        self._lone = [one for one in self._distinct if one[0] not in together]

    def _each(self) -> Iterator[Kept]:
        """Each block with where it is kept now."""
        self._resolve()
        return self._at(self._distinct)

    def _live(self, ids: frozenset[int], form: str = "") -> tuple[Iterator[Batch], Iterator[Live]]:
        """What these parameters make up: what goes through a list form that the kind has of its own, and the rest."""
        self._resolve()
        own = form in self._own
        together = [batch.of(ids) for batch in self._batches] if own else []
        lone = [
            (block, storages, [storage for storage in storages if any(id(leaf) in ids for leaf in storage.leaves)])
            for block, storages in (self._lone if own else self._distinct)
        ]
        return self._at(batch for batch in together if batch.blocks), self._at(one for one in lone if one[2])

    def _at(self, parts: Iterable[Part]) -> Iterator[Part]:
        for part in parts:
            self.at = part if isinstance(part, Batch) else part[0]
            yield part
        self.at = None

    # --- the trial of its kind ---------------------------------------------------------------------------------------

    def trial(self) -> Hashable:
        """What `prove` tries: equal for rules of which one may stand for all; None for one that nothing stands for."""
        self._resolve()
        limited = (one for one in self._distinct if any(storage.limited for storage in one[1]))
        if self._lone if self._own else any(limited):
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
                if one.shape != other.shape or not _close(one, other):
                    raise PluginError(
                        f"rule {self.binding.key!r}: {form} of {kind.__module__}.{kind.__qualname__} does not do what "
                        f"the loop over its {LOOPS[form]} does, for weights of shape {tuple(other.shape)}"
                    )


def _close(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal up to rounding. Most are just equal, which is told in a tenth of the time."""
    near = max(torch.finfo(of.dtype).eps for of in (one, other)) ** 0.5
    now = one.to(other)
    return torch.equal(now, other) or torch.allclose(now, other, near, near, equal_nan=True)
