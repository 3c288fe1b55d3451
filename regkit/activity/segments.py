"""Segments: stretches of activity, as padded tensors, packed sequences, single steps of a cell, or final states."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from regkit.activity.padding import Mask, Validity
from regkit.errors import StepError

Pairs = tuple[Tensor, Tensor, "Tensor | None"]


class Segment(ABC):
    """A stretch of activity of one direction of one module."""

    @property
    @abstractmethod
    def batch(self) -> int:
        """How many sequences it holds."""

    @abstractmethod
    def values(self) -> tuple[Tensor, Tensor | None]:
        """The activity (..., features), and which rows of it are valid (..., 1), None meaning all."""

    @abstractmethod
    def pairs(self) -> Pairs | None:
        """h_t and h_{t-1} (..., features), and which pairs are valid; None where there are no neighbours."""

    def neighbours(self) -> Sequence[Pairs]:
        """The pairs as views of the activity, in as many pieces as that takes."""
        pairs = self.pairs()
        return () if pairs is None else (pairs,)

    def at(self, place: Callable[[Tensor], Any]) -> Segment | None:
        """The same segment with what `place` makes of its tensors in their place; None if its class does not say how.

        Closed-form gradients need it, with views from `values` and `neighbours`: autograd does without.
        """
        return None


@dataclass(frozen=True)
class Sequenced(Segment):
    """A padded sequence.  h: (time, batch, features); valid: (time, batch, 1) or None."""

    h: Tensor
    valid: Tensor | None = None
    backward: bool = False

    @property
    def batch(self) -> int:
        return self.h.size(1)

    def values(self) -> tuple[Tensor, Tensor | None]:
        return self.h, self.valid

    def pairs(self) -> Pairs | None:
        valid = None if self.valid is None else self.valid[1:] & self.valid[:-1]
        later, earlier = self.h[1:], self.h[:-1]
        # The backward half runs against time: what it computed before h_t is h_{t+1}.
        return (earlier, later, valid) if self.backward else (later, earlier, valid)

    def at(self, place: Callable[[Tensor], Any]) -> Segment:
        return type(self)(place(self.h), self.valid, self.backward)


@dataclass(frozen=True)
class Packed(Segment):
    """A packed sequence's rows, which hold no padding.  h: (frames, features)."""

    h: Tensor
    batch_sizes: Tensor
    backward: bool = False

    @property
    def batch(self) -> int:
        return int(self.batch_sizes[0])

    def values(self) -> tuple[Tensor, Tensor | None]:
        return self.h, None

    def pairs(self) -> Pairs | None:
        # Row (t, b) lies batch_sizes[t-1] rows behind row (t-1, b), whatever b: sequences are sorted by length.
        # batch_sizes lives on the CPU by torch's own contract, so nothing waits for a GPU here.
        first = self.batch
        back = torch.repeat_interleave(self.batch_sizes[:-1], self.batch_sizes[1:])
        earlier_rows = torch.arange(first, self.h.size(0), device="cpu") - back
        later = self.h[first:]
        earlier = self.h.index_select(0, earlier_rows.to(self.h.device, non_blocking=True))
        return (earlier, later, None) if self.backward else (later, earlier, None)

    def neighbours(self) -> Sequence[Pairs]:
        # While as many sequences go on, the rows of the step before lie equally far behind: stretches of rows.
        found: list[Pairs] = []
        sizes: list[int] = self.batch_sizes.tolist()
        start = sizes[0]
        for back, steps in groupby(pairwise(sizes), itemgetter(0)):
            rows = sum(now for _, now in steps)
            later, earlier = self.h.narrow(0, start, rows), self.h.narrow(0, start - back, rows)
            found.append((earlier, later, None) if self.backward else (later, earlier, None))
            start += rows
        return found

    def at(self, place: Callable[[Tensor], Any]) -> Segment:
        return type(self)(place(self.h), self.batch_sizes, self.backward)


@dataclass(frozen=True)
class Stepped(Segment):
    """One step of a cell, or a final state.  h: (..., batch, features); previous: h_{t-1} or None."""

    h: Tensor
    previous: Tensor | None = None
    valid: Tensor | None = None
    pair_valid: Tensor | None = None

    @property
    def batch(self) -> int:
        return self.h.size(-2)

    def values(self) -> tuple[Tensor, Tensor | None]:
        return self.h, self.valid

    def pairs(self) -> Pairs | None:
        return None if self.previous is None else (self.h, self.previous, self.pair_valid)

    def at(self, place: Callable[[Tensor], Any]) -> Segment:
        previous = None if self.previous is None else place(self.previous)
        return type(self)(place(self.h), previous, self.valid, self.pair_valid)


def of_output(
    h: Tensor | PackedSequence,
    *,
    batch_first: bool,
    directions: Sequence[str],
    wanted: Sequence[str],
    valid: Validity | None,
) -> list[Segment]:
    """The segments of a sequence module's output, one for each direction, of which the `wanted` are kept.

    h: (time, batch, directions · features), or batch first, or (time, directions · features) unbatched, or packed.
    """
    if isinstance(h, PackedSequence) and isinstance(valid, Mask):
        raise StepError("mask() was given for a packed sequence, which knows what is data; leave the mask out")
    if isinstance(h, PackedSequence):
        data, mask = h.data, None
    else:
        if h.dim() == 2:
            h, batch_first = h.unsqueeze(1), False
        elif batch_first:
            h = h.transpose(0, 1)
        data, mask = h, None if valid is None else valid.of_sequence(h, batch_first)
    halves = data.chunk(len(directions), dim=-1) if len(directions) > 1 else (data,)
    found: list[Segment] = []
    for name, half in zip(directions, halves, strict=True):
        if name in wanted:
            back = name == "backward"
            found.append(
                Packed(half, h.batch_sizes, back) if isinstance(h, PackedSequence) else Sequenced(half, mask, back)
            )
    return found


def of_step(h: Tensor, previous: Tensor | None, valid: Validity | None, step: int) -> Segment:
    """The segment of one call of a cell.  h: (batch, features) or (features,).

    `previous` counts as h_{t-1} only if it was computed in this graph: an initial state (zeros, a parameter, or one
    detached from the sequence before) is no neighbour, as h_0 of nn.LSTM is none.
    """
    if previous is not None and previous.grad_fn is None:
        previous = None
    if h.dim() == 1:
        h, previous = h.unsqueeze(0), None if previous is None else previous.unsqueeze(0)
    if valid is None:
        return Stepped(h, previous)
    return Stepped(h, previous, valid.of_step(h, step), valid.of_pair(h, step))
