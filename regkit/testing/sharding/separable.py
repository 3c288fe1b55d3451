"""The laws of kinds on weights that say they are `separable`: parts of a weight come to what the whole does."""

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
"""What every penalty keeps that says it is separable."""

CONSTRAINT_PARTS: Final[Laws[Constraint]] = Laws()
"""What every constraint keeps that says it is separable."""

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
    """Raise Broken unless the parts of weights come to what the whole does by every function of a penalty."""
    for w, division in _divided(penalty, separable):
        for name, function in _functions(penalty):
            ours, wanted = function(w, division), function(w, None)
            off = difference(ours, wanted)
            hold(off < _NEAR, f"{name}() of {division.named(w)} is off by {off:.3g} times its size from the whole's")


def stands_alone(constraint: Constraint, separable: Separable) -> None:
    """Raise Broken unless the parts of weights are projected as the whole is, and the worst is the violation."""
    for w, division in _divided(constraint, separable):
        parts = division.of(w)
        moved = w.clone()
        with torch.no_grad():
            constraint.project_(division.of(moved))
        wanted = constraint.project(w)
        projected = division.joined([constraint.project(part) for part in parts])
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
    """Weights, and the ways in which they can be divided. Raises Broken where there is no way."""
    found = False
    for scale in _SCALES:
        for w in weights(kind, scale):
            for division in divisions(w, axes_of(w, separable)):
                found = True
                yield w, division
    hold(found, "no weight that it takes can be divided")


_Of = Callable[[Tensor, "Division | None"], Tensor]


def _functions(penalty: Penalty) -> Iterator[tuple[str, _Of]]:
    """The functions of a penalty, by name: of a weight in one, or of the parts that a division makes."""

    def parts(w: Tensor, division: Division | None) -> list[Tensor]:
        return [w] if division is None else division.of(w)

    def side_by_side(function: Callable[[Tensor], Tensor]) -> _Of:
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
