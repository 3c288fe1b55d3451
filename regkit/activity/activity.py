"""Activities: the outputs of a recurrent module, with their neighbours in time and without padding.

A module's outputs come as padded tensors, packed sequences, single steps of a cell, or final states. Each is a
`Segment`; an `Activity` is all segments that one rule sees at one place since the last `attachment.penalty()`. It
reduces a function over their valid elements, or adds the gradient of that to the outputs' gradients. Half-precision
outputs are read in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regkit.activity.reduction import Part, Reduction, Total, add_slopes, at_least_float32, reduced
from regkit.activity.segments import Segment


@dataclass(frozen=True)
class Activity:
    """All outputs that a rule sees at one place: the argument of `ActivityPenalty.value`.

    >>> h = torch.tensor([[[3.0]], [[5.0]]])  # (time, batch, features)
    >>> activity = regkit.Activity([regkit.activity.Sequenced(h)])
    >>> activity.reduce(torch.square)
    tensor(17.)
    >>> activity.reduce_pairs(lambda now, before: now - before)
    tensor(2.)
    """

    segments: Sequence[Segment]

    def values(self) -> Iterator[Tensor]:
        """The raw outputs, padding included, a tensor (..., features) each."""
        return (segment.values()[0] for segment in self.segments)

    def reduce(
        self, f: Callable[[Tensor], Tensor], reduction: Reduction = "mean", total: Total | None = None
    ) -> Tensor:
        """f(h), summed or averaged over the valid elements as `reduction` says.

        f: (..., features) -> (..., features) or (..., 1).
        total: f and its sum in one go, for speed where autograd is off: total(h, scratch=...) -> (), where scratch(h)
        is memory of h's shape to write into; f keeps the shape, and f(0) is 0.

        Raises PluginError where f returns another shape.
        """
        return reduced(self._each(reduction), f, reduction, total)

    def reduce_pairs(
        self,
        f: Callable[[Tensor, Tensor], Tensor],
        reduction: Reduction = "mean",
        total: Total | None = None,
    ) -> Tensor:
        """f(h_t, h_{t-1}), summed or averaged over the valid pairs of neighbours; 0 where there are no pairs."""
        parts = self._neighbours(reduction)
        return reduced(parts, f, reduction, total) if parts else at_least_float32(next(self.values())).new_zeros(())

    def add_slopes(
        self,
        gradients: Activity,
        slope: Callable[[Tensor], Tensor],
        amount: Tensor,
        reduction: Reduction = "mean",
        *,
        times: float = 1.0,
        per_row: bool = False,
    ) -> None:
        """gradients += amount · times · d reduce(f, reduction) / d h, in place, where slope(h) is the derivative of f.

        gradients: as in `ActivityPenalty.add_gradients`.
        slope: (..., features) -> (..., features).
        per_row: whether f returns (..., 1).

        Raises PluginError where slope returns another shape.
        """
        add_slopes(self._each(reduction, gradients), slope, amount, reduction, times, per_row)

    def add_pair_slopes(
        self,
        gradients: Activity,
        slope: Callable[[Tensor, Tensor], Tensor | tuple[Tensor, Tensor]],
        amount: Tensor,
        reduction: Reduction = "mean",
        *,
        times: float = 1.0,
        per_row: bool = False,
    ) -> None:
        """gradients += amount · times · d reduce_pairs(f, reduction) / d h, in place; see `add_slopes`.

        slope: (h_t, h_{t-1}) -> the derivative of f by each of the two, or by h_t alone where f is a function of
        h_t − h_{t-1}.
        """
        add_slopes(self._neighbours(reduction, gradients), slope, amount, reduction, times, per_row)

    def _each(self, reduction: Reduction, gradients: Activity | None = None) -> list[Part]:
        """The parts over which `reduce` reduces, with their gradients."""
        parts = []
        for segment, gradient in zip(self.segments, (gradients or self).segments, strict=True):
            h, valid = segment.values()
            views = () if gradients is None else gradient.values()[:1]
            parts.append(Part(segment.batch if reduction == "batch" else 1, (h,), valid, views))
        return parts

    def _neighbours(self, reduction: Reduction, gradients: Activity | None = None) -> list[Part]:
        """The parts over which `reduce_pairs` reduces, with their gradients."""
        # With autograd all pairs are one piece: the graph grows with the pieces.
        whole = gradients is None and torch.is_grad_enabled()
        parts = []
        for segment, gradient in zip(self.segments, (gradients or self).segments, strict=True):
            pairs = Segment.neighbours(segment) if whole else segment.neighbours()
            batch = segment.batch if reduction == "batch" else 1
            views = pairs if gradients is None else gradient.neighbours()
            for (later, earlier, valid), pair in zip(pairs, views, strict=True):
                parts.append(Part(batch, (later, earlier), valid, () if gradients is None else pair[:2]))
        return parts
