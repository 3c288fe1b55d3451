"""Sums and means of a function over the valid elements of many tensors, and their gradients in closed form.

With autograd, whole tensors go through the function. Without autograd, pieces do: a part of one large tensor, or many
small ones together, as many rows at a time as there is room for. So no temporary is as large as all tensors together,
and a hundred small tensors take as many operations as one. Half precision is read in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import repeat
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor

from regkit.errors import PluginError

Reduction = Literal["mean", "batch", "sum"]
"""`mean` over valid elements; `batch`: the sum divided by the batch size; `sum`."""

ROOM: Final = {True: 2**20, False: 2**26}
"""The bytes of a piece: on a CPU as many as its cache holds, elsewhere as many as keep an accelerator busy."""


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32 or better: sums of half-precision numbers overflow and stall."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def total(terms: Sequence[Tensor], device: torch.device) -> Tensor:
    """The sum of scalars on `device`, in float32 or better.  -> ()."""
    if not terms:
        return torch.zeros((), dtype=torch.float32, device=device)
    first, *others = terms
    result = at_least_float32(first.to(device))
    for term in others:
        result = result + term.to(device)
    return result


class Part(NamedTuple):
    """Tensors of one shape (..., features), with their valid rows (..., 1); None where all are valid.

    batch: the number of sequences, where a sum is divided by that number; else 1.
    gradients: live views of the tensors' gradients, to be added to.
    """

    batch: int
    tensors: tuple[Tensor, ...]
    valid: Tensor | None
    gradients: tuple[Tensor, ...] = ()

    def cut(self, rows: int) -> Iterable[Part]:
        """The part, cut into parts of at most this many rows."""
        tensors, gradients = (
            zip(*(torch.split(x, rows) for x in xs), strict=True) for xs in (self.tensors, self.gradients)
        )
        valid = repeat(None) if self.valid is None else torch.split(self.valid, rows)
        return map(Part, repeat(self.batch), tensors, valid, gradients if self.gradients else repeat(()))

    def joins(self, other: Part) -> bool:
        """Whether the rows of both parts can be concatenated."""
        a, b = self.tensors[0], other.tensors[0]
        return (
            a.shape[1:] == b.shape[1:]
            and a.dtype is b.dtype
            and a.device == b.device
            and self.batch == other.batch
            and (self.valid is None) == (other.valid is None)
        )


Piece = list[Part]
"""Parts that are read together, as one tensor."""


def _pieces(parts: Sequence[Part]) -> list[Piece]:
    pieces: list[Piece] = []
    left = 0
    in_piece: set[tuple[int, int, int]] = set()
    for part in parts:
        h = part.tensors[0]
        size, limit = h.numel() * max(h.element_size(), 4), ROOM[h.is_cpu]  # in bytes, once in float32
        if size > limit:
            pieces += [[one] for one in part.cut(max(h.size(0) * limit // size, 1))]
            left = 0
            continue
        # A list operation adds to all gradients of a piece at once: no gradient may be in a piece twice.
        places: list[tuple[int, int, int]] = []
        if len(parts) > 1:
            for which, gradient in enumerate(part.gradients):
                places.append((which, gradient.untyped_storage()._cdata, int(gradient.storage_offset())))
        if not pieces or size > left or not in_piece.isdisjoint(places) or not part.joins(pieces[-1][0]):
            pieces.append([])
            left, in_piece = limit, set()
        pieces[-1].append(part)
        left -= size
        in_piece.update(places)
    return pieces


def _read(piece: Piece) -> tuple[list[Tensor], Tensor | None]:
    """The tensors of a piece in float32 or better, with 0 in invalid rows; and the valid rows, None for all."""
    if len(piece) == 1:
        (part,) = piece
        wide, valid = list(map(at_least_float32, part.tensors)), part.valid
    else:
        wide = [at_least_float32(torch.cat(xs)) for xs in zip(*(part.tensors for part in piece), strict=True)]
        valid = _valid(piece)
    # Both sides of f are masked: the outside drops f(0) from the sum, the inside keeps a NaN in the padding from
    # reaching the gradient, where 0 · NaN would be NaN.
    return wide if valid is None else [torch.where(valid, x, 0.0) for x in wide], valid


def _valid(piece: Piece) -> Tensor | None:
    masks = [part.valid for part in piece if part.valid is not None]
    return torch.cat(masks) if len(masks) > 1 else masks[0] if masks else None


Total = Callable[..., Tensor]
"""f and its sum in one go: total(*tensors, scratch), where scratch(x) is memory of x's shape, shared by all pieces."""


def reduced(
    parts: Sequence[Part], f: Callable[..., Tensor], reduction: Reduction, total: Total | None = None
) -> Tensor:
    """f of the tensors, summed or averaged over the valid elements as `reduction` says. There is at least one part.

    total: used where autograd is off; f then keeps the shape of the tensors, and f(0) is 0.

    Raises PluginError where f does not keep the rows.
    """
    pieces = [[part] for part in parts] if torch.is_grad_enabled() else _pieces(parts)
    f_and_sum = None if total is None or torch.is_grad_enabled() else partial(total, scratch=_Scratch())
    sums: list[Tensor] = []
    count: int | Tensor = 0
    for piece in pieces:
        wide, valid = _read(piece)
        if f_and_sum is not None:
            width, value = wide[0].size(-1), f_and_sum(*wide)
        else:
            values = _checked(f(*wide), wide[0])
            width, value = values.size(-1), (values if valid is None else torch.where(valid, values, 0.0)).sum()
        sums.append(value / max(piece[0].batch, 1) if reduction == "batch" else value)
        if reduction == "mean":
            count = count + _count(piece, valid, width)
    result = sums[0] if len(sums) == 1 else torch.stack(sums).sum()
    if reduction != "mean":
        return result
    return result / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))


class _Scratch:
    """Memory that the pieces of one reduction share."""

    _memory: Tensor | None = None

    def __call__(self, like: Tensor) -> Tensor:
        if self._memory is None or self._memory.shape != like.shape:
            self._memory = torch.empty_like(like)
        return self._memory


def _checked(values: Tensor, h: Tensor) -> Tensor:
    """The values of f. Raises PluginError where their rows are not h's: a mask would be broadcast over a wrong axis."""
    if values.shape[:-1] != h.shape[:-1] or values.size(-1) not in (1, h.size(-1)):
        raise PluginError(f"reduce() was given a function of {tuple(h.shape)} that returns {tuple(values.shape)}")
    return values


def _count(piece: Piece, valid: Tensor | None, width: int) -> int | Tensor:
    """The number of valid values of f in a piece, where f returns `width` values for each row."""
    if valid is not None:
        return valid.sum() * width
    rows = 0
    for part in piece:
        h = part.tensors[0]
        rows += h.numel() // max(h.size(-1), 1)
    return rows * width


def add_slopes(
    parts: Sequence[Part],
    slope: Callable[..., Tensor | tuple[Tensor, ...]],
    amount: Tensor,
    reduction: Reduction,
    times: float,
    per_row: bool,
) -> None:
    """gradients += amount · times · the gradient of `reduced(parts, f, reduction)`, in place.

    slope: the derivative of f by each tensor, of the tensor's shape; a single one for two tensors is the derivative by
    the first, and minus the derivative by the second.
    per_row: whether f returns one number for each row.

    Raises PluginError where a slope does not have the shape of the tensor.
    """
    pieces = _pieces(parts)
    if reduction == "mean":
        count: int | Tensor = 0
        for piece in pieces:
            valid = piece[0].valid if len(piece) == 1 else _valid(piece)
            count = count + _count(piece, valid, 1 if per_row else piece[0].tensors[0].size(-1))
        if isinstance(count, int):
            times /= max(count, 1)
        else:
            amount = amount / count.clamp(min=1)
    for piece in pieces:
        wide, valid = _read(piece)
        share = times / max(piece[0].batch, 1) if reduction == "batch" else times
        slopes = slope(*wide)
        for which in range(len(wide)):
            derivative = slopes[which] if isinstance(slopes, tuple) else slopes
            factor = -share if which and derivative is slopes else share
            if derivative.shape != wide[0].shape:
                raise PluginError(f"a slope at {tuple(wide[0].shape)} has the shape {tuple(derivative.shape)}")
            if valid is not None:
                derivative = torch.where(valid, derivative, 0.0)
            if len(piece) == 1:
                piece[0].gradients[which].addcmul_(derivative, amount, value=factor)
            else:
                gradients = [part.gradients[which] for part in piece]
                added = torch.split(derivative * amount, [g.size(0) for g in gradients])
                torch._foreach_add_(gradients, added, alpha=factor)
