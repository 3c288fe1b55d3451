"""Buckets of weights for list forms of kinds: enough at a time to be fast, and no more than a bound.

The bound is 4 MB on a CPU, where temporaries of a bucket are still in the cache when they are read again, and 64 MB
elsewhere, where few kernels matter more. On a CPU, a quarter of the bound was slower and twice the bound no faster.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from torch import Tensor

_CPU: Final = 1 << 22
_ELSEWHERE: Final = 1 << 26


def room(w: Tensor) -> int:
    """The number of elements that a list form may hold at a time for weights like w, in float32 or better.

    >>> regkit.buckets.room(torch.zeros(3))
    1048576
    """
    return (_CPU if w.device.type == "cpu" else _ELSEWHERE) // max(w.itemsize, 4)


def buckets(weights: Sequence[Tensor], room: int | None = None) -> tuple[list[list[int]], list[int]]:
    """The indices of small weights, in lists of at most `room` elements each; and of large ones, for `pieces`.

    A weight of more than an eighth of the room is large.

    >>> regkit.buckets.buckets([torch.zeros(2), torch.zeros(3), torch.zeros(40)], room=32)
    ([[0, 1]], [2])
    """
    if room is None:
        room = (_CPU if weights[0].is_cpu else _ELSEWHERE) // max(weights[0].itemsize, 4)
    together: list[list[int]] = []
    large: list[int] = []
    left = 0
    for index, w in enumerate(weights):
        size = w.numel()
        if size > room >> 3:
            large.append(index)
        elif size > left:
            together.append([index])
            left = room - size
        else:
            together[-1].append(index)
            left -= size
    return together, large


def pieces(w: Tensor, room: int, axis: int = 0) -> Sequence[Tensor]:
    """Views of w that divide an axis, of at most `room` elements each, or of one index where a single one has more.

    >>> [tuple(piece.shape) for piece in regkit.buckets.pieces(torch.zeros(4, 3), room=6)]
    [(2, 3), (2, 3)]
    """
    if w.numel() <= room:
        return (w,)
    size = w.size(axis)
    return w.chunk(math.ceil(size / max(1, room * size // w.numel())), axis)
