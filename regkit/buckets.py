"""How much a kind's list form works on at a time: enough to be fast, and no more than a bound.

The bound is 4 MB on a CPU, where what is made of a bucket of weights is in the cache still when it is read again, and
64 MB elsewhere, where few kernels matter more. Measured on a CPU: a quarter of it is slower, twice as much no faster.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from torch import Tensor

_CPU: Final = 1 << 22
_ELSEWHERE: Final = 1 << 26


def room(w: Tensor) -> int:
    """How many numbers a list form may hold at a time for weights such as w, in float32 or better."""
    return (_CPU if w.device.type == "cpu" else _ELSEWHERE) // max(w.itemsize, 4)


def buckets(weights: Sequence[Tensor], room: int | None = None) -> tuple[list[list[int]], list[int]]:
    """The indices of small weights, in lists of at most `room` numbers each; and of large ones, for `pieces`.

    Large is what has more than an eighth of the room.
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
    """Views of w that divide an axis, of at most `room` numbers each; of one index, where a single one has more."""
    if w.numel() <= room:
        return (w,)
    size = w.size(axis)
    return w.chunk(math.ceil(size / max(1, room * size // w.numel())), axis)
