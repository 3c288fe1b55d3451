"""Activities: what a recurrent module put out, with its neighbours in time and without its padding.

A module's outputs come as padded tensors, packed sequences, single steps of a cell, or final states. Each is a
`Segment`; an `Activity` is all segments that one rule sees at one place since they were last consumed, and reduces a
function over their valid elements. Half-precision outputs are read in float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from regkit.errors import PluginError, StepError
from regkit.validity import Mask, Validity

Reduction = Literal["mean", "batch", "sum"]
Pairs = tuple[Tensor, Tensor, "Tensor | None"]


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32 where it is narrower: sums of half-precision numbers overflow and stall."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


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


@dataclass(frozen=True)
class Activity:
    """All activity that a rule sees at one place: what `ActivityPenalty.value` is given."""

    segments: Sequence[Segment]

    def values(self) -> Iterator[Tensor]:
        """The raw outputs, padding included, a tensor (..., features) each."""
        return (segment.values()[0] for segment in self.segments)

    def reduce(self, f: Callable[[Tensor], Tensor], reduction: Reduction = "mean") -> Tensor:
        """f(h), summed or averaged over the valid elements as `reduction` says.

        f: (..., features) -> (..., features) or (..., 1). Raises PluginError where f returns another shape.
        """
        parts = [(segment.batch, *segment.values()) for segment in self.segments]
        return _reduced([(batch, _masked(f, valid, h), valid) for batch, h, valid in parts], reduction)

    def reduce_pairs(self, f: Callable[[Tensor, Tensor], Tensor], reduction: Reduction = "mean") -> Tensor:
        """Σ or mean of f(h_t, h_{t-1}) over the valid pairs of neighbours; 0 where there is none."""
        found = [(segment.batch, segment.pairs()) for segment in self.segments]
        parts = [(batch, pairs) for batch, pairs in found if pairs is not None]
        if not parts:
            return at_least_float32(next(self.values())).new_zeros(())
        return _reduced([(b, _masked(f, valid, h, prev), valid) for b, (h, prev, valid) in parts], reduction)


def _masked(f: Callable[..., Tensor], valid: Tensor | None, *tensors: Tensor) -> Tensor:
    wide = [at_least_float32(x) for x in tensors]
    if valid is None:
        return _kept(f(*wide), wide[0])
    # Both sides of f are masked: the outside drops f(0) from the sum, the inside keeps a NaN in the padding from
    # reaching the gradient, where 0 · NaN would be NaN.
    inside = [torch.where(valid, x, 0.0) for x in wide]
    return torch.where(valid, _kept(f(*inside), wide[0]), 0.0)


def _kept(values: Tensor, h: Tensor) -> Tensor:
    """The values of f, if it kept h's shape up to the features: else a mask would be broadcast over the wrong axis."""
    if values.shape[:-1] != h.shape[:-1] or values.size(-1) not in (1, h.size(-1)):
        raise PluginError(f"reduce() was given a function of {tuple(h.shape)} that returns {tuple(values.shape)}")
    return values


def _reduced(parts: list[tuple[int, Tensor, Tensor | None]], reduction: Reduction) -> Tensor:
    if reduction == "sum":
        return _total([values.sum() for _, values, _ in parts])
    if reduction == "batch":
        return _total([values.sum() / max(batch, 1) for batch, values, _ in parts])
    total = _total([values.sum() for _, values, _ in parts])
    count = sum(_count(values, valid) for _, values, valid in parts)
    return total / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))


def _total(terms: list[Tensor]) -> Tensor:
    return terms[0] if len(terms) == 1 else torch.stack(terms).sum()


def _count(values: Tensor, valid: Tensor | None) -> int | Tensor:
    return values.numel() if valid is None else valid.sum() * values.size(-1)


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
    data = h.data if isinstance(h, PackedSequence) else h
    halves = zip(directions, data.chunk(len(directions), dim=-1), strict=True)
    kept = [(name == "backward", half) for name, half in halves if name in wanted]
    if isinstance(h, PackedSequence):
        return [Packed(half, h.batch_sizes, backward) for backward, half in kept]
    return [_padded(half, batch_first, valid, backward) for backward, half in kept]


def _padded(h: Tensor, batch_first: bool, validity: Validity | None, backward: bool) -> Segment:
    if h.dim() == 2:
        h, batch_first = h.unsqueeze(1), False
    elif batch_first:
        h = h.transpose(0, 1)
    return Sequenced(h, None if validity is None else validity.of_sequence(h, batch_first), backward)


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
