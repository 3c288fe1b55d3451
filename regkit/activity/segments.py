"""Segments: stretches of activity, as padded tensors, packed sequences, single steps of a cell, or final states."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
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
"""h_t and h_{t-1}, of one shape (..., features), and the valid pairs (..., 1); None where all are valid."""


class Segment(ABC):
    """A stretch of outputs of one direction of one module.

    >>> segment = regkit.activity.of_step(torch.ones(2, 3), None, None, 0)
    >>> isinstance(segment, regkit.Segment), segment.batch
    (True, 2)
    """

    @property
    @abstractmethod
    def batch(self) -> int:
        """The number of sequences."""

    @abstractmethod
    def values(self) -> tuple[Tensor, Tensor | None]:
        """The outputs (..., features), and their valid rows (..., 1); None where all are valid."""

    @abstractmethod
    def pairs(self) -> Pairs | None:
        """The pairs of neighbours in time; None where there are no neighbours."""

    def neighbours(self) -> Sequence[Pairs]:
        """The pairs as views of the outputs, in as many pieces as needed."""
        pairs = self.pairs()
        return () if pairs is None else (pairs,)

    @property
    def paired(self) -> bool:
        """Whether the segment has neighbours in time at all, be these data or padding."""
        return self.pairs() is not None

    def at(self, place: Callable[[Tensor], Any]) -> Segment | None:
        """This segment with `place(tensor)` in the place of each of its tensors; None if the class cannot do that.

        Closed-form gradients need this, with views from `values` and `neighbours`; autograd does not.
        """
        return None


@dataclass(frozen=True)
class Sequenced(Segment):
    """A padded sequence.  h: (time, batch, features); valid: (time, batch, 1) or None.

    previous: (batch, features), the state before the first output that was computed, as `of_output` says; or None.

    >>> later, earlier, valid = regkit.activity.Sequenced(torch.arange(3.0).view(3, 1, 1)).pairs()
    >>> later.flatten(), earlier.flatten()
    (tensor([1., 2.]), tensor([0., 1.]))
    """

    h: Tensor
    valid: Tensor | None = None
    backward: bool = False
    previous: Tensor | None = None

    @property
    def batch(self) -> int:
        return self.h.size(1)

    @property
    def paired(self) -> bool:
        return self.h.size(0) > 1 or self.previous is not None

    def values(self) -> tuple[Tensor, Tensor | None]:
        return self.h, self.valid

    def pairs(self) -> Pairs | None:
        pieces = self.neighbours()
        if len(pieces) == 1:
            return pieces[0]
        later, earlier = (torch.cat(parts) for parts in zip(*(piece[:2] for piece in pieces), strict=True))
        valid = None if self.valid is None else torch.cat([piece[2] for piece in pieces if piece[2] is not None])
        return later, earlier, valid

    def neighbours(self) -> Sequence[Pairs]:
        h, valid = self.h, None if self.valid is None else self.valid[1:] & self.valid[:-1]
        # The backward direction runs against time: before h_t, the module computed h_{t+1}.
        inner = (h[:-1], h[1:], valid) if self.backward else (h[1:], h[:-1], valid)
        if self.previous is None:
            return (inner,)
        start = slice(h.size(0) - 1, None) if self.backward else slice(1)
        first = h[start], self.previous.unsqueeze(0), None if self.valid is None else self.valid[start]
        return (inner, first) if h.size(0) > 1 else (first,)

    def at(self, place: Callable[[Tensor], Any]) -> Segment:
        previous = None if self.previous is None else place(self.previous)
        return type(self)(place(self.h), self.valid, self.backward, previous)


@dataclass(frozen=True)
class Packed(Segment):
    """The rows of a packed sequence, without padding.  h: (frames, features).

    previous: (batch, features), as in `Sequenced`, in the order of the rows.

    >>> packed = nn.utils.rnn.pack_sequence([torch.zeros(3, 2), torch.zeros(1, 2)])
    >>> regkit.activity.Packed(packed.data, packed.batch_sizes).batch
    2
    """

    h: Tensor
    batch_sizes: Tensor
    backward: bool = False
    previous: Tensor | None = None

    @property
    def batch(self) -> int:
        return int(self.batch_sizes[0])

    @property
    def paired(self) -> bool:
        return len(self.batch_sizes) > 1 or self.previous is not None

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
        later, earlier = (earlier, later) if self.backward else (later, earlier)
        if self.previous is not None:
            firsts, states, _ = zip(*self._first(), strict=True)
            later, earlier = torch.cat([later, *firsts]), torch.cat([earlier, *states])
        return later, earlier, None

    def neighbours(self) -> Sequence[Pairs]:
        # While the number of sequences stays, the rows of the step before lie equally far behind: stretches of rows.
        pieces: list[Pairs] = []
        sizes: list[int] = self.batch_sizes.tolist()
        start = sizes[0]
        for back, steps in groupby(pairwise(sizes), itemgetter(0)):
            rows = sum(now for _, now in steps)
            later, earlier = self.h.narrow(0, start, rows), self.h.narrow(0, start - back, rows)
            pieces.append((earlier, later, None) if self.backward else (later, earlier, None))
            start += rows
        return [*pieces, *self._first()]

    def _first(self) -> Iterator[Pairs]:
        """The pairs of the first output of each sequence and the state before."""
        if self.previous is None:
            return
        if not self.backward:
            yield self.h[: self.batch], self.previous, None
            return
        # Against time, the first output of a sequence is that of its last step.
        start = 0
        for size, following in pairwise([*self.batch_sizes.tolist(), 0]):
            if following < size:
                yield self.h[start + following : start + size], self.previous[following:size], None
            start += size

    def at(self, place: Callable[[Tensor], Any]) -> Segment:
        previous = None if self.previous is None else place(self.previous)
        return type(self)(place(self.h), self.batch_sizes, self.backward, previous)


@dataclass(frozen=True)
class Stepped(Segment):
    """One step of a cell, or a final state.  h: (..., batch, features); previous: h_{t-1} or None.

    >>> step = regkit.activity.Stepped(torch.ones(1, 2), previous=torch.zeros(1, 2))
    >>> regkit.Activity([step]).reduce_pairs(lambda now, before: now - before, "sum")
    tensor(2.)
    """

    h: Tensor
    previous: Tensor | None = None
    valid: Tensor | None = None
    pair_valid: Tensor | None = None

    @property
    def batch(self) -> int:
        return self.h.size(-2)

    def values(self) -> tuple[Tensor, Tensor | None]:
        return self.h, self.valid

    @property
    def paired(self) -> bool:
        return self.previous is not None

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
    before: Tensor | None = None,
) -> list[Segment]:
    """The segments of a sequence module's output, one for each direction in `wanted`.

    h: (time, batch, directions · features), or batch first, or (time, directions · features) unbatched, or packed.
    before: the state that was handed in, (directions, batch, features) or (directions, features) unbatched, with the
    sequences in the caller's order. The state is the neighbour of the first output exactly where a gradient can reach
    the state: then the call goes on from outputs of the same graph, or from an initial state that is learned. Zeros, or
    a state that was detached, are data.
    """
    if isinstance(h, PackedSequence) and isinstance(valid, Mask):
        raise StepError("mask() was given for a packed sequence, which knows what is data; leave the mask out")
    before = _reachable(before, h)
    if isinstance(h, PackedSequence):
        data, mask = h.data, None
    else:
        if h.dim() == 2:
            h, batch_first = h.unsqueeze(1), False
        elif batch_first:
            h = h.transpose(0, 1)
        data, mask = h, None if valid is None else valid.of_sequence(h, batch_first)
    halves = data.chunk(len(directions), dim=-1) if len(directions) > 1 else (data,)
    segments: list[Segment] = []
    for at, (name, half) in enumerate(zip(directions, halves, strict=True)):
        if name in wanted:
            back, previous = name == "backward", None if before is None else before[at]
            segments.append(
                Packed(half, h.batch_sizes, back, previous)
                if isinstance(h, PackedSequence)
                else Sequenced(half, mask, back, previous)
            )
    return segments


def _reachable(before: Tensor | None, h: Tensor | PackedSequence) -> Tensor | None:
    """The state handed in, in the order of h's rows; None where no gradient reaches the state.

    before: as in `of_output`.  -> (directions, batch, features).
    """
    if before is None or not before.requires_grad:
        return None
    if isinstance(h, PackedSequence):
        return before if h.sorted_indices is None else before.index_select(1, h.sorted_indices)
    return before.unsqueeze(1) if h.dim() == 2 else before


def of_step(h: Tensor, previous: Tensor | None, valid: Validity | None, step: int) -> Segment:
    """The segment of one call of a cell.  h: (batch, features) or (features,).

    previous: the state that was handed in, which is h_{t-1} where a gradient can reach the state, as in `of_output`.
    """
    if previous is not None and not previous.requires_grad:
        previous = None
    if h.dim() == 1:
        h, previous = h.unsqueeze(0), None if previous is None else previous.unsqueeze(0)
    if valid is None:
        return Stepped(h, previous)
    return Stepped(h, previous, valid.of_step(h, step), valid.of_pair(h, step))
