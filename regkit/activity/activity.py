"""Activities: what a recurrent module put out, with its neighbours in time and without its padding.

A module's outputs come as padded tensors, packed sequences, single steps of a cell, or final states. Each is a
`Segment`; an `Activity` is all segments that one rule sees at one place since they were last consumed, and reduces a
function over their valid elements, or adds the gradient of that to theirs. Half-precision outputs are read in float32.
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
    """All activity that a rule sees at one place: what `ActivityPenalty.value` is given."""

    segments: Sequence[Segment]

    def values(self) -> Iterator[Tensor]:
        """The raw outputs, padding included, a tensor (..., features) each."""
        return (segment.values()[0] for segment in self.segments)

    def reduce(
        self, f: Callable[[Tensor], Tensor], reduction: Reduction = "mean", total: Total | None = None
    ) -> Tensor:
        """f(h), summed or averaged over the valid elements as `reduction` says.

        f: (..., features) -> (..., features) or (..., 1). total: f and its sum in one go, for speed where autograd is
        off: total(h, scratch=...) -> (), where scratch(h) is memory of h's shape to write into; f keeps the shape, and
        f(0) is 0. Raises PluginError where f returns another shape.
        """
        return reduced(self._each(reduction), f, reduction, total)

    def reduce_pairs(
        self,
        f: Callable[[Tensor, Tensor], Tensor],
        reduction: Reduction = "mean",
        total: Total | None = None,
    ) -> Tensor:
        """Σ or mean of f(h_t, h_{t-1}) over the valid pairs of neighbours; 0 where there is none."""
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

        gradients: as `ActivityPenalty.add_gradients` is given them. slope: (..., features) -> (..., features).
        per_row: whether f returns (..., 1). Raises PluginError where slope returns another shape.
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
        """The same of `reduce_pairs`. slope(h_t, h_{t-1}) is the derivative by each of the two, or by h_t alone where
        f is a function of h_t − h_{t-1}.
        """
        add_slopes(self._neighbours(reduction, gradients), slope, amount, reduction, times, per_row)

    def _each(self, reduction: Reduction, gradients: Activity | None = None) -> list[Part]:
        """What `reduce` reduces over, with the gradients of it."""
        found = []
        for segment, own in zip(self.segments, (gradients or self).segments, strict=True):
            h, valid = segment.values()
            live = () if gradients is None else own.values()[:1]
            found.append(Part(segment.batch if reduction == "batch" else 1, (h,), valid, live))
        return found

    def _neighbours(self, reduction: Reduction, gradients: Activity | None = None) -> list[Part]:
        """What `reduce_pairs` reduces over, with the gradients of it."""
        # Autograd takes them in one piece: its graph grows with the pieces.
        whole = gradients is None and torch.is_grad_enabled()
        found = []
        for segment, own in zip(self.segments, (gradients or self).segments, strict=True):
            pairs = Segment.neighbours(segment) if whole else segment.neighbours()
            batch = segment.batch if reduction == "batch" else 1
            live = pairs if gradients is None else own.neighbours()
            for (later, earlier, valid), pair in zip(pairs, live, strict=True):
                found.append(Part(batch, (later, earlier), valid, () if gradients is None else pair[:2]))
        return found
