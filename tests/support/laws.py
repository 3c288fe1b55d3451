"""The table of kinds for the laws: each kind with a formula in numpy float64. A new kind must join it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from torch import Tensor

from regkit import Penalty
from regkit.registry.registry import default

Array = NDArray[np.float64]
Sequences = list[Array]
REDUCTIONS = ("mean", "batch", "sum")
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


@dataclass(frozen=True)
class Case:
    """A kind, and what it should do: of a penalty its value, of an activity penalty the terms of one sequence, of a
    constraint the wanted norm of a group (None: it has no groups), of a schedule its factor.
    """

    kind: Any
    reference: Callable[..., Any] | None


def make(name: str, **options: Any) -> Any:
    return default().kind(name)(**options)


# --- the formulas ----------------------------------------------------------------------------------------------------


def squared_distance_to_orthogonal(w: Array) -> float:
    return float(((np.linalg.svd(w, compute_uv=False) ** 2 - 1) ** 2).sum())


def mean_cosine(rows: Array) -> float:
    n = len(rows)
    norms = np.sqrt((rows**2).sum(1, keepdims=True))
    unit = rows / np.where(norms == 0, 1, norms)
    cosines = np.abs(unit @ unit.T)
    return float((cosines.sum() - np.trace(cosines)) / (n * (n - 1))) if n > 1 else 0.0


def in_groups(w: Array, per: str) -> Iterator[Array]:
    """Views of the groups, one by one; a cell's weight is (gates, hidden[, columns]), a bias' unit one scalar."""
    if per == "matrix" or (per == "input" and w.ndim == 1):
        yield w
    elif per == "unit":
        yield from (w[i : i + 1] for i in range(w.shape[0]))
    else:  # inputs are columns, and so are the hidden units of a cell
        yield from (w[:, j] for j in range(w.shape[1]))


def projected(case: Case, w: Array) -> Array:
    point = w.copy()
    if case.reference is None:
        return np.where(point < 0, 0.0, point)
    for group in in_groups(point, case.kind.per):
        norm = math.sqrt((group**2).sum())
        if norm > 0:
            group *= case.reference(norm) / norm
    return point


def violated(case: Case, w: Array) -> float:
    if case.reference is None:
        return max(0.0, float(-w.min()))
    norms = [math.sqrt((group**2).sum()) for group in in_groups(w, case.kind.per)]
    return max(abs(norm - case.reference(norm)) for norm in norms)


def stairs(step: int) -> float:
    return 0.0 if step < 10 else 2.0 if step < 20 else 0.5


PENS = [
    Case(make("l1", strength=2.0), lambda w: np.abs(w).sum()),
    Case(make("l2", strength=0.3), lambda w: (w**2).sum()),
    Case(make("l1_l2", l1=0.7, l2=0.2), lambda w: 0.7 * np.abs(w).sum() + 0.2 * (w**2).sum()),
    Case(make("l1_l2", l1=0.7), lambda w: 0.7 * np.abs(w).sum()),
    Case(make("orthogonal", strength=1.0), squared_distance_to_orthogonal),
    Case(make("orthogonal", strength=1.0, per="matrix"), squared_distance_to_orthogonal),
    Case(make("cosine_orthogonal", strength=1.0), mean_cosine),
    Case(make("cosine_orthogonal", strength=1.0, mode="columns", per="gate"), lambda w: mean_cosine(w.T)),
]
ACTS = [
    Case(make("activity_l1", strength=1.0), np.abs),
    Case(make("activity_l2", strength=1.0), np.square),
    Case(make("activity_l1_l2", l1=0.7, l2=0.2), lambda h: 0.7 * np.abs(h) + 0.2 * h**2),
    Case(make("temporal", strength=1.0), lambda h: np.diff(h, axis=0) ** 2),
    Case(make("norm_stabilizer", strength=1.0), lambda h: np.diff(np.sqrt((h**2).sum(-1))) ** 2),
]
PERS = ("unit", "input", "cell", "matrix")
CONS = [
    *(Case(make("max_norm", max_value=1.5, per=per), lambda n: min(n, 1.5)) for per in PERS),
    *(Case(make("unit_norm", per=per), lambda n: 1.0) for per in PERS),
    *(Case(make("min_max_norm", min_value=0.5, max_value=2, per=per), lambda n: min(max(n, 0.5), 2)) for per in PERS),
    Case(make("min_max_norm", max_value=1.5), lambda n: min(n, 1.5)),
    Case(make("non_negative"), None),
]
SCHEDS = [
    Case(make("constant", value=0.3), lambda t: 0.3),
    Case(make("linear", start=0.25, end=1.5, steps=40), lambda t: np.interp(t, [0, 40], [0.25, 1.5])),
    Case(make("linear", start=1.5, end=0, steps=1), lambda t: 1.5 if t == 0 else 0.0),
    Case(make("cosine", start=1.5, end=0.1, steps=40), lambda t: 0.1 + 1.4 * math.cos(math.pi * min(t, 40) / 80) ** 2),
    Case(make("cosine", start=0, end=0.7, steps=3), lambda t: 0.7 * math.sin(math.pi * min(t, 3) / 6) ** 2),
    Case(make("exponential", start=0.8, decay=0.5, steps=10), lambda t: 0.8 * 0.5 ** (t / 10)),
    Case(make("exponential", decay=0.5, steps=10, limit=0.1), lambda t: max(0.5 ** (t / 10), 0.1)),
    Case(make("exponential", decay=2, steps=10, limit=6), lambda t: min(2.0 ** min(t / 10, 9), 6)),
    Case(make("piecewise", boundaries=[10, 20], values=[0, 2, 0.5]), stairs),
]
CASES = [*PENS, *ACTS, *CONS, *SCHEDS]


def each(cases: Sequence[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [pytest.param(case, id=case.kind.describe()) for case in cases])


PROXIMAL = [case for case in PENS if type(case.kind).prox is not Penalty.prox]
CONVEX = [case for case in CONS if case.kind.kind != "unit_norm" and not getattr(case.kind, "min_value", 0)]


def random(shape: Sequence[int], seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


def close(ours: Tensor | Array | float, wanted: Tensor | Array | float, rtol: float = 1e-12) -> None:
    np.testing.assert_allclose(np.asarray(ours, float), np.asarray(wanted, float), rtol=rtol, atol=rtol)


def shapes(kind: Any) -> list[tuple[int, ...]]:
    """Shapes that the kind takes: wide, square, tall, one row, one column, vectors; with gates in front for cells."""
    if kind.layout == "cell":
        return [(4, 3, 5), (1, 2, 2), (3, 4)]
    everything = [(3, 5), (4, 4), (6, 2), (1, 4), (5, 1), (7,), (1,)]
    return [shape for shape in everything if len(shape) in kind.ranks]


def numbers(*ranks: int) -> st.SearchStrategy[Array]:
    """Arrays with many zeros and repeated values; whole hundredths, so that no square underflows."""
    sizes = st.sampled_from(ranks).flatmap(lambda rank: st.tuples(*[st.integers(1, 5)] * rank))
    return hnp.arrays(np.float64, sizes, elements=st.integers(-(10**6), 10**6).map(lambda n: n / 100))
