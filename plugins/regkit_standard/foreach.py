"""List forms: many weights at once, in operations over lists of tensors, whatever the kind.

Elementwise kinds work in `portions`, kinds of whole matrices in `stacks`, kinds of norms with `scale_groups_`. Whatever
is made on the way holds no more numbers than `regkit.buckets` says, however many weights there are and however large.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import repeat
from operator import itemgetter
from typing import Final, Literal

import torch
from torch import Tensor
from torch.compiler import is_compiling

from regkit.activity import at_least_float32
from regkit.buckets import buckets, pieces, room

WIDE: Final = (torch.float32, torch.float64)
"""The types that sums are made in; what is narrower is read in float32."""

Tensors = tuple[Tensor, ...] | list[Tensor]

Portion = tuple[Tensors, Tensors, "Tensor | None"]

Per = Literal["unit", "input", "cell", "matrix"]
"""The groups of a weight: its rows, its columns, the gate rows of each hidden unit, or the whole."""

_FEW: Final = 2  # matrices are looked at one by one


# --- portions, for what is done to each number ------------------------------------------------------------------------


def portions(weights: list[Tensor], gradients: list[Tensor]) -> Iterator[Portion]:
    """Weights in float32 or better, with their gradients: many small ones; or a piece of a large one, and a workspace.

    The workspace is of the piece's shape, and the same memory for all: fresh memory is slower than the arithmetic.
    """
    narrow = weights[0].dtype not in WIDE
    together, large = buckets(weights)
    for some in together:
        pick = itemgetter(*some) if len(some) > 1 else itemgetter(slice(some[0], some[0] + 1))
        ws = pick(weights)
        yield list(map(Tensor.float, ws)) if narrow else ws, pick(gradients), None
    work: Tensor | None = None
    for i in large:
        limit = room(weights[i])
        for w, g in zip(pieces(weights[i], limit), pieces(gradients[i], limit), strict=True):
            w = at_least_float32(w)
            if work is None or work.numel() < w.numel():
                work = w.new_empty(max(w.numel(), min(limit, weights[i].numel())))
            yield [w], [g], work[: w.numel()].view(w.shape)


def signs(weights: Tensors, work: Tensor | None) -> tuple[Tensor, ...]:
    """The signs of a portion's weights, in its workspace where there is one."""
    return torch._foreach_sign(weights) if work is None else (torch.sign(weights[0], out=work),)


def sum_of_powers(weights: list[Tensor], power: Literal[1, 2]) -> Tensor:
    """Σ|w| or Σw² over all weights, for reports: without autograd, which a norm does not suit at zero.  -> ()."""
    sums: list[Tensor] = []
    for ws, _, work in portions(weights, weights):
        if work is None:
            norms = torch.stack(torch._foreach_norm(ws, power))
            sums.append((norms if power == 1 else norms.square()).sum())
        else:
            sums.append(torch.abs(ws[0], out=work).sum() if power == 1 else torch.square(ws[0], out=work).sum())
    return torch.stack(sums).sum()


# --- stacks, for what is done to each matrix --------------------------------------------------------------------------


def stacks(weights: list[Tensor], gradients: list[Tensor]) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Weights of one shape in float32 or better, (count, rows, columns), and their gradients; a large one alone."""
    alike, large = _alike(weights)
    for indices in (*alike, *([index] for index in large)):
        ws = [weights[index] for index in indices]
        yield at_least_float32(torch.stack(ws) if len(ws) > 1 else ws[0].unsqueeze(0)), [gradients[i] for i in indices]


def divided(stack: Tensor, gradients: list[Tensor], axis: int) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Pieces of a stack along an axis of its matrices, -2 or -1, each with the same pieces of the gradients."""
    limit = room(stack)
    parts = [pieces(gradient, limit, axis) for gradient in gradients]
    for piece, *gs in zip(pieces(stack, limit, axis), *parts, strict=True):
        yield piece, gs


def _alike(weights: list[Tensor], sizes: slice = slice(None)) -> tuple[list[list[int]], list[int]]:
    """The indices of small weights, in buckets of shapes that agree in `sizes`; and the indices of large weights."""
    together, large = buckets(weights)
    alike: list[list[int]] = []
    for some in together:
        shapes: dict[tuple[int, ...], list[int]] = {}
        for index in some:
            shapes.setdefault(weights[index].shape[sizes], []).append(index)
        alike += shapes.values()
    return alike, large


# --- norms of groups --------------------------------------------------------------------------------------------------


def group_norms(w: Tensor, per: Per) -> Tensor:
    """The 2-norm of each group of w, in float32 or better, and broadcastable to w. Each is the same to the last bit,
    whatever stands beside a group and however it lies in memory. A vector is a matrix of one column."""
    if w.dim() < (3 if per == "cell" else 2):
        return group_norms(w.unsqueeze(-1), per).squeeze(-1)
    if w.numel() <= (limit := room(w)):
        norms = _of_rows(w, per)
    else:
        norms = torch.cat([_of_rows(piece, per) for piece in pieces(w, limit, -2)], -2)
    if per == "unit":
        return norms
    return _sum(norms if per == "input" else norms.square(), -3 if per == "cell" else -2).sqrt()


def _of_rows(w: Tensor, per: Per) -> Tensor:
    """The norm of each row; for inputs, the sum of the rows' squares."""
    w = at_least_float32(w)
    if per == "input":
        return _sum(w.square(), -2)
    rows = w if w.stride(-1) == 1 else w.contiguous()  # or torch would add up in another order, and slowly
    norms: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return norms


def _sum(w: Tensor, axis: int) -> Tensor:
    """The sum along an axis, in the place of w: one half is added to the other half, again and again.

    As exact as a sum can be; and on a CPU ten times as fast as `vector_norm` along columns, or more.
    """
    while (size := w.size(axis)) > 1:
        half = size // 2
        w.narrow(axis, 0, half).add_(w.narrow(axis, size - half, half))
        w = w.narrow(axis, 0, size - half)
    return w


def ratio(wanted: Tensor, norms: Tensor) -> Tensor:
    """wanted / norms: the factors of groups. Exactly 1 where a group is as wanted already, and where its norm is zero,
    NaN, infinite (numbers in it may be finite), or so small that the factor would overflow."""
    factors = wanted / norms
    return torch.where((factors > 0) & (factors < math.inf), factors, 1.0)


def scaled(w: Tensor, factors: Tensor, inwards: bool) -> Tensor:
    """w · factors in w's dtype.

    inwards: in half precision, round what shrinks towards zero and what grows away from zero: rounded to the nearest
    number, half of all groups would end up on the wrong side of the bound that they were brought to.
    """
    exact = at_least_float32(w) * factors
    near = exact.to(w.dtype)
    if not inwards or w.dtype in WIDE:
        return near
    beyond = at_least_float32(near).abs() - exact.abs()
    # The bits of a number, without the sign, are in the order of the numbers: one less is the next towards zero.
    step = ((factors > 1) & (beyond < 0)).to(torch.int16) - ((factors < 1) & (beyond > 0)).to(torch.int16)
    return (near.view(torch.int16) + step).view(w.dtype)


def scale_groups_(weights: list[Tensor], per: Per, wanted: Callable[[Tensor], Tensor], inwards: bool = False) -> None:
    """Multiply each group of each weight in place by the `ratio` of its wanted norm to its norm.

    wanted: from the norms of groups, the norms that they are given.
    inwards: as of `scaled`.
    """
    axis, ranks = (1, 3) if per == "cell" else (0, 2)
    by_rows = per == "unit" and weights[0].dtype in WIDE
    groups = [*weights]  # side by side along the axis
    for index, w in enumerate(weights):
        if w.dim() < ranks:
            groups[index] = w.unsqueeze(-1)
    if per in ("input", "matrix"):
        groups = [w.unsqueeze(0) for w in groups]
    few = by_rows and len(groups) <= _FEW
    for some, joined in [(groups, False)] if few else _side_by_side(groups, axis, by_rows):
        ws = [torch.cat(some, axis)] if joined else some
        each = []
        for w in ws:  # a comprehension would be a call more
            if by_rows and w.stride(-1) == 1:
                each.append(torch.linalg.vector_norm(w, dim=-1, keepdim=True))
            else:
                each.append(group_norms(w, per))
        # The norms of all are looked at together: they are few numbers.
        norms = each[0] if len(each) == 1 else torch.cat(each)
        given = wanted(norms)
        if type(norms) is Tensor and norms.is_cpu and not is_compiling() and torch.equal(norms, given):
            continue
        factors = ratio(given, norms)
        parts = [factors] if len(each) == 1 else torch.split_with_sizes(factors, list(map(len, each)))
        if inwards and ws[0].dtype not in WIDE:
            for w, part in zip(ws, parts, strict=True):
                _scale_inwards_(w, part)
        else:
            for w, part in zip(ws, parts, strict=True):
                w *= part
        if joined:
            sizes = list(map(Tensor.size, some, repeat(axis)))
            torch._foreach_copy_(some, torch.split_with_sizes(ws[0], sizes, axis))


def _scale_inwards_(w: Tensor, factors: Tensor) -> None:
    """Multiply a weight of half precision in place, as `scaled` does, in pieces of rows."""
    rows = pieces(w, room(w), -2)
    each = (
        repeat(factors)
        if factors.size(-2) == 1
        else torch.split_with_sizes(factors, [one.size(-2) for one in rows], -2)
    )
    for piece, part in zip(rows, each, strict=False):
        piece.copy_(scaled(piece, part, inwards=True))


def _side_by_side(weights: list[Tensor], axis: int, by_rows: bool) -> list[tuple[list[Tensor], bool]]:
    """The weights in portions, and whether to join each along the axis: many small ones; large ones, in pieces unless
    their norms are read by rows, of which no copy is made."""
    alike, large = _alike(weights, slice(1, None) if axis == 0 else slice(0, None, 2))
    found: list[tuple[list[Tensor], bool]] = []
    if large and by_rows:
        found.append(([weights[index] for index in large], False))
    elif large:
        limit = room(weights[0])
        found += [([piece], False) for index in large for piece in pieces(weights[index], limit, axis)]
    for indices in alike:
        found.append((list(map(weights.__getitem__, indices)), len(indices) > 1))
    return found
