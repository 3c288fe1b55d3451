"""The law of `fits`, by which a kind says which shapes of weights are taken."""

from __future__ import annotations

from typing import Final

from regkit import Constraint, Penalty
from regkit.testing.laws import Laws, hold
from regkit.testing.samples.tensors import possible, ranked, refusal

FITTING_LAWS: Final[Laws[Penalty | Constraint]] = Laws()


@FITTING_LAWS.add(lambda kind: type(kind).fits is not Penalty.fits, root=1)
def says_what_it_fits(kind: Penalty | Constraint) -> None:
    """A plan asks of each weight's shape whether the kind `fits`, and shows the reason to the one who wrote the rule.
    Return None for a shape that is taken, else one line that says why not; refuse in `fits` all that the mathematics
    refuse."""
    for shape in ranked(kind):
        reason = kind.fits(shape)
        line = isinstance(reason, str) and bool(reason.strip()) and "\n" not in reason
        hold(reason is None or line, f"fits({shape}) gives {reason!r}, which is neither None nor a line")
    taken = possible(kind)
    hold(taken, f"fits() refuses every weight of ranks {kind.ranks}, also of 64 rows and columns")
    for shape in taken:
        error = refusal(kind, shape)
        hold(error is None, f"fits({shape}) is None, and a weight {shape} raised {type(error).__name__}: {error}")
