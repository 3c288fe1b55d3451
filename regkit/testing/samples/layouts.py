"""One batch in every layout in which a module may put out its sequences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

from regkit import Activity, Segment, Validity
from regkit.activity import of_output, of_step
from regkit.activity.padding import Lengths, Mask
from regkit.testing.samples.tensors import random

BOTH = ("forward", "backward")
LENGTHS = (3, 5, 1, 4)
"""The lengths of the sequences of a batch, not sorted; the first sequence is not the longest."""


def batch(seed: int = 0, scale: float = 1.0, features: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    """The outputs of a module: (5, 4, features), time first, with padding behind `LENGTHS`."""
    return random((max(LENGTHS), len(LENGTHS), features), seed, scale, dtype)


def mask(lengths: Sequence[int] = LENGTHS) -> Tensor:
    """(time, batch): True where there is data."""
    return torch.arange(max(lengths), device="cpu")[:, None] < torch.tensor(list(lengths), device="cpu")


def padded(
    h: Tensor,
    lengths: Sequence[int] | None = None,
    *,
    batch_first: bool = False,
    directions: Sequence[str] = BOTH[:1],
    valid: Validity | None = None,
) -> Activity:
    """The outputs h as one segment; with lengths, the steps behind the end of a sequence are padding."""
    known = valid if lengths is None else Lengths(torch.tensor(list(lengths), device="cpu"))
    return Activity(of_output(h, batch_first=batch_first, directions=directions, wanted=directions, valid=known))


def packed(h: Tensor, lengths: Sequence[int] = LENGTHS, directions: Sequence[str] = BOTH[:1]) -> Activity:
    """The outputs h without padding, the rows of each step together."""
    rows = pack_padded_sequence(h, torch.tensor(list(lengths), device="cpu"), enforce_sorted=False)
    return Activity(of_output(rows, batch_first=False, directions=directions, wanted=directions, valid=None))


def layouts(
    h: Tensor, lengths: Sequence[int] = LENGTHS, directions: Sequence[str] = BOTH[:1]
) -> Iterator[tuple[str, Activity]]:
    """Other layouts of `padded(h, lengths)`, by name."""
    valid = mask(lengths)
    yield "packed", packed(h, lengths, directions)
    yield "batch first", padded(h.transpose(0, 1), lengths, batch_first=True, directions=directions)
    yield "with a mask", padded(h, directions=directions, valid=Mask(valid))
    yield (
        "batch first with a mask",
        padded(h.transpose(0, 1), batch_first=True, directions=directions, valid=Mask(valid.T)),
    )


def alone(h: Tensor, lengths: Sequence[int] = LENGTHS, directions: Sequence[str] = BOTH[:1]) -> Activity:
    """The sequences of a batch, unbatched and without padding."""
    segments: list[Segment] = []
    for one, length in enumerate(lengths):
        segments += padded(h[:length, one], directions=directions).segments
    return Activity(segments)


def steps(h: Tensor, lengths: Sequence[int] = LENGTHS) -> Activity:
    """The outputs h as a cell puts out, in a loop over time."""
    valid = Lengths(torch.tensor(list(lengths), device="cpu"))
    leaf = h if h.requires_grad else h.clone().requires_grad_()
    calls = (leaf * 1.0).unbind()  # computed, as a state is: what is not counts as no neighbour
    return Activity([of_step(now, calls[t - 1] if t else None, valid, t) for t, now in enumerate(calls)])
