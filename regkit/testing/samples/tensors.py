"""Weights and activities to try kinds on, equal at every run: no random number of the caller's is drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice, product
from typing import Final

import torch
from torch import Tensor

from regkit import Activity, ActivityPenalty, Constraint, Penalty, Schedule
from regkit.activity import Sequenced
from regkit.kinds import Kind

MATRICES = ((3, 5), (4, 4), (6, 2), (1, 4), (5, 1))
"""Wide, square, tall, one row, one column."""

VECTORS = ((7,), (1,))

HALVES = (torch.float16, torch.bfloat16)
DTYPES = (*HALVES, torch.float32, torch.float64)

_SMALL: Final = {1: 513, 2: 65, 3: 9}
"""By rank, above the largest size of an axis at which a shape that fits is looked for."""

STEPS = (0, 1, 7, 100, 10**6)
"""Steps to ask a schedule at."""


def random(
    shape: Sequence[int], seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> Tensor:
    """Normal numbers times a scale; in every dtype the same numbers, rounded."""
    generator = torch.Generator("cpu").manual_seed(seed)
    numbers = torch.randn(tuple(shape), generator=generator, dtype=torch.float64, device="cpu")
    return (numbers * scale).to(device=device, dtype=dtype)


def strided(w: Tensor) -> Tensor:
    """A copy of a tensor as a view that is not contiguous: a part of a larger tensor, with the axes in reverse."""
    room = w.new_zeros([2 * size + 1 for size in reversed(w.shape)])
    view = room.permute(*reversed(range(w.dim())))[tuple(slice(1, None, 2) for _ in w.shape)]
    return view.copy_(w)


def ranked(kind: Penalty | Constraint) -> list[tuple[int, ...]]:
    """Shapes of the `ranks` of a kind: matrices and vectors, with gates in front for the layout `cell`."""
    if kind.layout == "cell":
        cells: list[tuple[int, ...]] = [(4, 3, 5), (1, 2, 2), (3, 4)]
        return [shape for shape in cells if len(shape) - 1 in kind.ranks]
    return [shape for shape in (*MATRICES, *VECTORS) if len(shape) in kind.ranks]


def possible(kind: Penalty | Constraint) -> list[tuple[int, ...]]:
    """Shapes of the `ranks` of a kind that fit; where none of the usual shapes does, the first that do of all small."""
    usual = [shape for shape in ranked(kind) if kind.fits(shape) is None]
    missing = {len(shape) for shape in ranked(kind)} - {len(shape) for shape in usual}
    small = chain.from_iterable(product(range(1, _SMALL[rank]), repeat=rank) for rank in sorted(missing))
    return [*usual, *islice((shape for shape in small if kind.fits(shape) is None), 2)]


def shapes(kind: Penalty | Constraint) -> list[tuple[int, ...]]:
    """The possible shapes that a kind does not refuse; the refused shapes are the matter of one law alone."""
    return [shape for shape in possible(kind) if refusal(kind, shape) is None]


def refusal(kind: Penalty | Constraint, shape: tuple[int, ...]) -> Exception | None:
    """The exception that a kind raises for a weight of a shape, if any."""
    scalar = kind.value if isinstance(kind, Penalty) else kind.violation
    try:
        scalar(torch.ones(shape, dtype=torch.float64, device="cpu"))
    except Exception as error:  # a stranger's code
        return error
    return None


def weights(
    kind: Penalty | Constraint, scale: float = 1.0, dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[Tensor]:
    """A random weight of each shape that a kind takes."""
    return [random(shape, seed + n, scale, dtype) for n, shape in enumerate(shapes(kind))]


def with_zeros(shape: Sequence[int], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Weights that are zero, or have a zero row or a zero column, with a description of each."""
    row, column = random(shape, 0, 3.0, dtype), random(shape, 1, 3.0, dtype)
    row[0], column[..., 0] = 0, 0
    yield f"a {dtype} weight {shape} that is zero", torch.zeros(shape, dtype=dtype, device="cpu")
    yield f"a {dtype} weight {shape} with a zero row", row
    yield f"a {dtype} weight {shape} with a zero column", column


def large(kind: Penalty | Constraint, dtype: torch.dtype) -> list[Tensor]:
    """Weights of one sign, so large that their sums overflow float16 and stall in bfloat16."""
    matrix, vector = ((4, 192, 192), (4, 2**15)) if kind.layout == "cell" else ((384, 384), (2**17,))
    sizes: list[tuple[int, tuple[int, ...]]] = [(2, matrix), (1, vector)]
    fitting = [shape for rank, shape in sizes if rank in kind.ranks and kind.fits(shape) is None]
    return [random(shape, dtype=dtype).abs() for shape in fitting if refusal(kind, shape) is None]


def activity(seed: int = 0, dtype: torch.dtype = torch.float64) -> Activity:
    """The outputs of a bidirectional layer over a padded batch: sequences of lengths 5, 4 and 1, 4 features."""
    valid = torch.arange(5, device="cpu").view(5, 1, 1) < torch.tensor([5, 4, 1], device="cpu").view(1, 3, 1)
    forward, backward = (random((5, 3, 4), seed + n, dtype=dtype) for n in range(2))
    return Activity([Sequenced(forward, valid), Sequenced(backward, valid, backward=True)])


def outcomes(kind: Kind, seed: int = 0) -> list[Tensor]:
    """The results of every function of a kind, on a few samples."""
    if isinstance(kind, Penalty):
        found: list[object] = [f(w) for w in weights(kind, seed=seed) for f in (kind.value, kind.gradient)]
        if kind.offers_prox:
            found += [kind.prox(w, 0.3) for w in weights(kind, seed=seed)]
    elif isinstance(kind, Constraint):
        found = [f(w) for w in weights(kind, seed=seed) for f in (kind.project, kind.violation)]
    elif isinstance(kind, ActivityPenalty):
        found = [kind.value(activity(seed))]
    elif isinstance(kind, Schedule):
        found = [kind.factor(step + seed) for step in STEPS]
    else:
        raise TypeError(f"{type(kind).__qualname__} is of no family that regkit knows")
    return [torch.as_tensor(one).detach() for one in found]


def identical(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal to the last bit, NaNs included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    ours, others = (x.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8) for x in (a, b))
    return torch.equal(ours, others)


def rounding(dtype: torch.dtype) -> float:
    """The largest error by rounding, as a share of the result's size: in half precision of the result alone."""
    return (8 if dtype in HALVES else 100) * torch.finfo(dtype).eps


def difference(ours: Tensor, wanted: Tensor, *sizes: Tensor) -> float:
    """The largest difference, as a share of the largest number wanted, or in `sizes`; infinite where shapes differ, or
    one alone is NaN."""
    if ours.shape != wanted.shape:
        return torch.inf
    ours, wanted = ours.detach().double(), wanted.detach().double()
    largest = max(float(size.detach().double().abs().max()) for size in (wanted, *sizes))
    return float(((ours - wanted).abs().max() / max(largest, 1e-300)).nan_to_num(torch.inf, torch.inf))
