"""What the numbers have to be."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Results = dict[str, Any]

L2, TERM = "L2: regkit", "L2: loss term"
_NONE, _EVERY = "max-norm, nothing violates: regkit", "max-norm, every row violates: regkit"


@dataclass(frozen=True)
class Bar:
    """One bar: what, on which workload, measured, and the limit. most: whether that is the most or the least."""

    what: str
    workload: str
    value: float
    limit: float
    most: bool = True

    @property
    def passed(self) -> bool:
        """Whether it holds."""
        return self.value <= self.limit if self.most else self.value >= self.limit

    def __str__(self) -> str:
        verdict, sign = "pass" if self.passed else "FAIL", "at most" if self.most else "at least"
        return f"{verdict}  {self.workload:<5} {self.what}: {self.value:.4g}, {sign} {self.limit:.4g}"


def bars(results: Results) -> list[Bar]:
    """Every bar whose workload was measured."""
    found = [bar for name, one in results["workloads"].items() for bar in _of(name, one["rows"])]
    if "first step" in results:
        *_, half, whole = results["first step"]
        taken = results["first step"][whole] / results["first step"][half]
        found.append(Bar(f"the first step of {whole} rules / of {half}", "first", taken, 2.5))
    if "keras" in results:
        found.append(
            Bar("Keras' regularized step / the same with regkit", "keras", results["keras"]["times"][0], 2, False)
        )
    return found


def _of(name: str, rows: Results) -> Iterator[Bar]:
    def median(row: str, field: str) -> float:
        value: float = rows[row][field][0]
        return value

    def ratio(row: str, other: str, field: str) -> float:
        lower = median(other, field)
        return median(row, field) / lower if lower > 0 else math.inf

    if name in ("e", "f"):  # cells in a loop, for parametrizations and activity beside what is written by hand
        return
    yield Bar("L2, operations", name, rows[L2]["operations"], 4)
    if name in ("a", "d1"):  # whose weights are less than a bucket
        yield Bar("L1, operations in a bucket", name, rows["L1: regkit"]["operations"], 8)
        yield Bar("elastic net, operations in a bucket", name, rows["elastic net: regkit"]["operations"], 8)
    if name in ("a", "b", "c"):
        yield Bar("L2, multiples of axpy", name, median(L2, "floors"), 1.15)
    if name in (shares := {"a": 1.5, "b": 1.0, "d1": 1.0, "d2": 2.0}):
        yield Bar("L2, % of the step", name, 100 * median(L2, "share"), shares[name])
    least = {"a": 4, "b": 8, "c": 8, "d1": 12, "d2": 12}[name]
    for field, where in (("step", "in a step"), ("alone", "alone")):
        for kind in ("single", "foreach"):
            yield Bar(f"L2 / weight_decay, {kind}, {where}", name, ratio(L2, f"L2: weight_decay, {kind}", field), 1)
        yield Bar(f"L2 as a loss term / regkit, {where}", name, ratio(TERM, L2, field), least, most=False)
    yield Bar("soft orthogonality / autograd", name, ratio("orthogonal: regkit", "orthogonal: loss term", "alone"), 0.7)
    if name in ("b", "c"):
        yield Bar("L1, multiples of axpy", name, median("L1: regkit", "floors"), 2.5)
        yield Bar("elastic net / L1", name, ratio("elastic net: regkit", "L1: regkit", "alone"), 1.2)
        yield Bar("max-norm, nothing violates, multiples of row norms", name, median(_NONE, "floors"), 1.2)
        yield Bar("max-norm, every row violates, multiples of row norms", name, median(_EVERY, "floors"), 2.1)
        yield Bar("unit-norm, multiples of row norms", name, median("unit-norm: regkit", "floors"), 2.1)
        yield Bar("non-negative, multiples of read and write", name, median("non-negative: regkit", "floors"), 1.1)
    if name in ("d1", "d2"):
        yield Bar("max-norm / loop of norms", name, ratio(_EVERY, "max-norm: loop of norms", "alone"), 1 / 3)
        yield Bar("unit-norm / loop", name, ratio("unit-norm: regkit", "unit-norm: loop", "alone"), 1 / 3)
    if name in ("a", "b"):
        yield Bar("AR / autograd", name, ratio("AR: regkit", "AR: loss term", "alone"), 0.4)
        yield Bar("AR and TAR / autograd", name, ratio("AR and TAR: regkit", "AR and TAR: loss term", "alone"), 0.5)
    if name == "b":
        yield Bar("AR, MB allocated", name, rows["AR: regkit"]["allocated"] / 1e6, 8.5)
        yield Bar("AR and TAR, MB allocated", name, rows["AR and TAR: regkit"]["allocated"] / 1e6, 25.2)
