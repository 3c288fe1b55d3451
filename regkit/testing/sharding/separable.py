"""The laws of `separable` kinds on weights: the parts of a weight together have the results of the whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import torch
from torch import Tensor

from regkit import Constraint, Penalty
from regkit.kinds import Separable
from regkit.testing.laws import Laws, hold
from regkit.testing.samples.tensors import difference, weights
from regkit.testing.sharding.parts import Division, axes_of, divisions

PENALTY_PARTS: Final[Laws[Penalty]] = Laws()
"""The laws of every penalty that is declared separable."""

CONSTRAINT_PARTS: Final[Laws[Constraint]] = Laws()
"""The laws of every constraint that is declared separable."""

_SCALES: Final = (0.1, 1.0, 10.0)
_NEAR: Final = 1e-9


def _says_so(kind: Penalty | Constraint) -> bool:
    return kind.separable is not None


@PENALTY_PARTS.add(_says_so)
def parts_add_up(penalty: Penalty) -> None:
    """Processes that hold a weight in shards apply a `separable` penalty each to its own rows or elements, and add up
    the values. Let the value be a plain sum over them: divide by no size, weigh no row by its place, compare none with
    another. Else let `separable` be "rows", or None; None too for the layout `cell`, whose rows lie apart."""
    _fits(penalty)
    adds_up(penalty, penalty.separable)


@CONSTRAINT_PARTS.add(_says_so)
def parts_are_projected_alone(constraint: Constraint) -> None:
    """Processes that hold a weight in shards project each its own rows or elements where a constraint is `separable`.
    Let none have a say in where another goes, and the worst be the violation. Else let `separable` be "rows", or None;
    None too for the layout `cell`, whose rows lie apart. Sums are no hindrance: see `pooled`."""
    _fits(constraint)
    stands_alone(constraint, constraint.separable)


def _fits(kind: Penalty | Constraint) -> None:
    known = kind.separable in ("elements", "rows")
    hold(known, f"separable is {kind.separable!r}, which is neither 'elements', 'rows' nor None")
    apart = kind.separable == "rows" and kind.layout == "cell"
    hold(not apart, "separable is 'rows' and layout 'cell', where the rows of a part are of one gate after the other")


def adds_up(penalty: Penalty, separable: Separable) -> None:
    """Raise Broken unless every function of a penalty gives for the parts of a weight the result of the whole."""
    for w, division in _divided(penalty, separable):
        for name, function in _functions(penalty):
            ours, wanted = function(w, division), function(w, None)
            off = difference(ours, wanted)
            hold(off < _NEAR, f"{name}() of {division.named(w)} is off by {off:.3g} times its size from the whole's")


def stands_alone(constraint: Constraint, separable: Separable) -> None:
    """Raise Broken unless the parts of weights are projected as the whole is, and the worst is the violation."""
    for w, division in _divided(constraint, separable):
        parts = division.split(w)
        moved = w.clone()
        with torch.no_grad():
            constraint.project_(division.split(moved))
        wanted = constraint.project(w)
        projected = division.join([constraint.project(part) for part in parts])
        for name, point in (("project", projected), ("project_", moved)):
            off = difference(point, wanted, w)
            hold(off < _NEAR, f"{name}() of {division.named(w)} is off by {off:.3g} times its size from the whole's")
        worst, whole = (
            float(torch.stack(of).amax()) for of in (_violations(constraint, parts), [constraint.violation(w)])
        )
        near = abs(worst - whole) <= _NEAR * (1 + whole)
        hold(near, f"the worst violation() of {division.named(w)} is {worst:.9g}, and {whole:.9g} of the whole")


def _violations(constraint: Constraint, parts: list[Tensor]) -> list[Tensor]:
    return [constraint.violation(part) for part in parts]


def _divided(kind: Penalty | Constraint, separable: Separable) -> Iterator[tuple[Tensor, Division]]:
    """Weights, each with a way to divide the weight. Raises Broken where there is none."""
    found = False
    for scale in _SCALES:
        for w in weights(kind, scale):
            for division in divisions(w, axes_of(w, separable)):
                found = True
                yield w, division
    hold(found, "no weight that it takes can be divided")


_OfParts = Callable[[Tensor, "Division | None"], Tensor]


def _functions(penalty: Penalty) -> Iterator[tuple[str, _OfParts]]:
    """The functions of a penalty, by name: of a weight in one, or of the parts that a division makes."""

    def parts(w: Tensor, division: Division | None) -> list[Tensor]:
        return [w] if division is None else division.split(w)

    def side_by_side(function: Callable[[Tensor], Tensor]) -> _OfParts:
        return lambda w, by: torch.cat([function(part) for part in parts(w, by)], 0 if by is None else by.axis)

    def add_gradients(w: Tensor, by: Division | None) -> Tensor:
        sums = torch.zeros_like(w)
        with torch.no_grad():
            penalty.add_gradients(parts(w, by), parts(sums, by), 0.3)
        return sums

    yield "value", lambda w, by: torch.stack([penalty.value(part) for part in parts(w, by)]).sum()
    yield "gradient", side_by_side(penalty.gradient)
    if penalty.offers_prox:
        yield "prox", side_by_side(lambda w: penalty.prox(w, 0.3))
    yield "values", lambda w, by: penalty.values(parts(w, by))
    yield "add_gradients", add_gradients
