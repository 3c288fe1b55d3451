"""Sums and means of a function over the valid elements of many tensors, and the gradients of them in closed form.

With autograd, whole tensors go through the function. Without it, pieces do: as many rows at a time as there is room
for, a part of one large tensor, or many small ones together. So no temporary is as large as what is reduced, and a
hundred small tensors take as many operations as one. Half precision is read in float32.
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

ROOM: Final = {True: 2**20, False: 2**26}
"""The bytes of a piece: what a processor's cache holds, or what keeps an accelerator busy."""


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32 where it is narrower: sums of half-precision numbers overflow and stall."""
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
    """Tensors of one shape (..., features), of which rows are valid (..., 1), None meaning all.

    batch: how many sequences they are of, where a sum is divided by that; gradients: live views of the tensors'
    gradients, to be added to.
    """

    batch: int
    tensors: tuple[Tensor, ...]
    valid: Tensor | None
    gradients: tuple[Tensor, ...] = ()

    def cut(self, rows: int) -> Iterable[Part]:
        """It in parts of so many rows."""
        tensors, gradients = (
            zip(*(torch.split(x, rows) for x in xs), strict=True) for xs in (self.tensors, self.gradients)
        )
        valid = repeat(None) if self.valid is None else torch.split(self.valid, rows)
        return map(Part, repeat(self.batch), tensors, valid, gradients if self.gradients else repeat(()))

    def joins(self, other: Part) -> bool:
        """Whether the rows of both can be one tensor's."""
        ours, theirs = self.tensors[0], other.tensors[0]
        return (
            ours.shape[1:] == theirs.shape[1:]
            and ours.dtype is theirs.dtype
            and ours.device == theirs.device
            and self.batch == other.batch
            and (self.valid is None) == (other.valid is None)
        )


Piece = list[Part]
"""Parts whose rows are read together."""


def _pieces(parts: Sequence[Part]) -> list[Piece]:
    pieces: list[Piece] = []
    left = 0
    seen: set[tuple[int, int, int]] = set()
    for part in parts:
        h = part.tensors[0]
        size, limit = h.numel() * max(h.element_size(), 4), ROOM[h.is_cpu]  # in bytes, as it is read
        if size > limit:
            pieces += [[one] for one in part.cut(max(h.size(0) * limit // size, 1))]
            left = 0
            continue
        # The gradients of a piece are added to at once, first ones and then second ones: none may be there twice.
        places: list[tuple[int, int, int]] = []
        if len(parts) > 1:
            for which, gradient in enumerate(part.gradients):
                places.append((which, gradient.untyped_storage()._cdata, int(gradient.storage_offset())))
        if not pieces or size > left or not seen.isdisjoint(places) or not part.joins(pieces[-1][0]):
            pieces.append([])
            left, seen = limit, set()
        pieces[-1].append(part)
        left -= size
        seen.update(places)
    return pieces


def _read(piece: Piece) -> tuple[list[Tensor], Tensor | None]:
    """The tensors of a piece in float32 or better, 0 where they are not valid; which of their rows are."""
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
    known = [part.valid for part in piece if part.valid is not None]
    return torch.cat(known) if len(known) > 1 else known[0] if known else None


Total = Callable[..., Tensor]
"""The sum of f in one go: total(*tensors, scratch), where scratch(x) is memory of x's shape, one for all pieces."""


def reduced(
    parts: Sequence[Part], f: Callable[..., Tensor], reduction: Reduction, total: Total | None = None
) -> Tensor:
    """f of the tensors, summed or averaged over the valid elements as `reduction` says. There is at least one part.

    total: used where autograd is off; f then keeps the shape of the tensors, and is 0 where they are. Raises
    PluginError where f does not keep the rows.
    """
    pieces = [[part] for part in parts] if torch.is_grad_enabled() else _pieces(parts)
    at_once = None if total is None or torch.is_grad_enabled() else partial(total, scratch=_Scratch())
    sums: list[Tensor] = []
    count: int | Tensor = 0
    for piece in pieces:
        wide, valid = _read(piece)
        if at_once is not None:
            width, found = wide[0].size(-1), at_once(*wide)
        else:
            values = _kept(f(*wide), wide[0])
            width, found = values.size(-1), (values if valid is None else torch.where(valid, values, 0.0)).sum()
        sums.append(found / max(piece[0].batch, 1) if reduction == "batch" else found)
        if reduction == "mean":
            count = count + _count(piece, valid, width)
    result = sums[0] if len(sums) == 1 else torch.stack(sums).sum()
    if reduction != "mean":
        return result
    return result / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))


class _Scratch:
    """Memory that pieces share."""

    _kept: Tensor | None = None

    def __call__(self, like: Tensor) -> Tensor:
        if self._kept is None or self._kept.shape != like.shape:
            self._kept = torch.empty_like(like)
        return self._kept


def _kept(values: Tensor, h: Tensor) -> Tensor:
    """The values of f, if it kept h's shape up to the features: else a mask would be broadcast over the wrong axis."""
    if values.shape[:-1] != h.shape[:-1] or values.size(-1) not in (1, h.size(-1)):
        raise PluginError(f"reduce() was given a function of {tuple(h.shape)} that returns {tuple(values.shape)}")
    return values


def _count(piece: Piece, valid: Tensor | None, width: int) -> int | Tensor:
    """How many of the numbers that f gives of a piece are valid, where it gives `width` for each row."""
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

    slope: the derivative of f by each tensor, of its shape; one alone of two tensors is that by the first and, turned
    around, by the second. per_row: whether f returns one number for each row. Raises PluginError where a slope does not
    have the shape of the tensor.
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
        found = slope(*wide)
        for which in range(len(wide)):
            one = found[which] if isinstance(found, tuple) else found
            factor = -share if which and one is found else share
            if one.shape != wide[0].shape:
                raise PluginError(f"a slope at {tuple(wide[0].shape)} has the shape {tuple(one.shape)}")
            if valid is not None:
                one = torch.where(valid, one, 0.0)
            if len(piece) == 1:
                piece[0].gradients[which].addcmul_(one, amount, value=factor)
            else:
                gradients = [part.gradients[which] for part in piece]
                torch._foreach_add_(gradients, torch.split(one * amount, [g.size(0) for g in gradients]), alpha=factor)
