"""Kinds that say of their parts what is not so, each with the law that catches it."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from regkit import Activity
from regkit.activity import Stepped, at_least_float32
from regkit.kinds import Layout, Separable
from tests.mutants.activities import Right as Squares
from tests.mutants.activities import RightChange
from tests.mutants.constraints import Right, norms_of, scaled
from tests.mutants.kinds import Ridge
from tests.mutants.mutant import Mutants
from tests.mutants.penalties import GroupLasso
from tests.mutants.right_constraints import SpectralBall

# --- penalties -------------------------------------------------------------------------------------------------------

PENALTIES = Mutants()


@PENALTIES.caught_by("parts_add_up", "value() of a weight (3, 5) divided into 1 + 4 columns is off by")
class RowsSaidToBeElements(GroupLasso):
    """A norm of each row, of which a column is no part."""

    @property
    def separable(self) -> Separable:
        return "elements"


@PENALTIES.caught_by("parts_add_up", "value() of a weight (3, 5) divided into 1 + 2 rows is off by")
class MeanSaidToBeSeparable(Ridge):
    """The mean over the weight, whose size no part knows."""

    @property
    def separable(self) -> Separable:
        return "elements"

    def value(self, w: Tensor) -> Tensor:
        return at_least_float32(w).square().mean()


@PENALTIES.caught_by("parts_add_up", "divided into 1 + 2 rows")
class RowsByTheirNumbers(Ridge):
    """Later rows weigh more: each for itself, but a part does not know which it has."""

    @property
    def separable(self) -> Separable:
        return "rows"

    def value(self, w: Tensor) -> Tensor:
        places = torch.arange(1, w.size(0) + 1, device=w.device).view(-1, *[1] * (w.dim() - 1))
        return (at_least_float32(w).square() * places).sum()


@PENALTIES.caught_by("parts_add_up", "add_gradients() of a weight", "divided into")
class ListCountsItsParts(Ridge):
    """A list form that is right of weights, unless they lie in one and the same."""

    @property
    def separable(self) -> Separable:
        return "elements"

    def add_gradients(self, weights: list[Tensor], gradients: list[Tensor], amount: float) -> None:
        whole = {id(w if w._base is None else w._base): i for i, w in enumerate(weights)}
        some = list(whole.values())  # the mistake
        super().add_gradients([weights[i] for i in some], [gradients[i] for i in some], amount)


@PENALTIES.caught_by("parts_add_up", "separable is 'rows' and layout 'cell'")
class RowsOfCells(Ridge):
    """Rows, in the layout in which they lie apart."""

    @property
    def layout(self) -> Layout:
        return "cell"

    @property
    def separable(self) -> Separable:
        return "rows"


@PENALTIES.caught_by("parts_add_up", "separable is 'columns', which is neither 'elements', 'rows' nor None")
class SeparableByColumns(Ridge):
    """A word that there is none of."""

    @property
    def separable(self) -> Any:
        return "columns"


# --- constraints -----------------------------------------------------------------------------------------------------

CONSTRAINTS = Mutants()


@CONSTRAINTS.caught_by("parts_are_projected_alone", "project() of a weight (3, 5) divided into 1 + 4 columns is off by")
class RowsSaidToBeProjectedByElements(Right):
    """A ball for each row, of which a column is no part."""

    @property
    def separable(self) -> Separable:
        return "elements"


@CONSTRAINTS.caught_by("parts_are_projected_alone", "project() of a weight (3, 5) divided into 1 + 2 rows")
class MatrixSaidToBeProjectedByRows(SpectralBall):
    """Singular values, which rows have together."""

    @property
    def separable(self) -> Separable:
        return "rows"


POOLED_TOO = "given_sums_parts_are_as_in_the_whole sums_have_their_shape sums_of_parts_add_up"


class RightPool(Right):
    """Each row's norm at most `largest`, by the sums of its squares."""

    @property
    def pooled(self) -> tuple[int, ...] | None:
        return (1,)

    def sums(self, w: Tensor) -> Tensor:
        return at_least_float32(w).square().sum(1, keepdim=True)

    def project_given(self, w: Tensor, sums: Tensor) -> Tensor:
        norms = sums.sqrt()
        return scaled(w, norms, norms.clamp(max=self.largest))

    def violation_given(self, w: Tensor, sums: Tensor) -> Tensor:
        return (sums.sqrt() - self.largest).clamp(min=0).amax()


@CONSTRAINTS.caught_by("sums_have_their_shape", "pooled over (1,), is (3,), not (3, 1)", also=POOLED_TOO)
class SumsWithoutTheAxis(RightPool):
    """`keepdim` forgotten; what uses the sums puts it back."""

    def sums(self, w: Tensor) -> Tensor:
        return super().sums(w).squeeze(1)

    def project_given(self, w: Tensor, sums: Tensor) -> Tensor:
        return super().project_given(w, sums.unsqueeze(1))


@CONSTRAINTS.caught_by("sums_have_their_shape", "sums() of torch.float16", "inf", also=POOLED_TOO)
class SumsInHalf(RightPool):
    """Squares that overflow before they are made wide."""

    def sums(self, w: Tensor) -> Tensor:
        return at_least_float32(w.square()).sum(1, keepdim=True)


@CONSTRAINTS.caught_by(
    "sums_have_their_shape", "sums() of torch.float16 (3, 5) is torch.float16, not torch.float32", also=POOLED_TOO
)
class SumsRoundedToHalf(RightPool):
    """Summed as it should be, up to a limit, and then made narrow."""

    def sums(self, w: Tensor) -> Tensor:
        return super().sums(w).clamp(max=65504.0).to(w.dtype) if w.dtype == torch.float16 else super().sums(w)


@CONSTRAINTS.caught_by("sums_have_their_shape", "pooled is (1,) and layout 'cell'", also=POOLED_TOO)
class PoolsCells(RightPool):
    """Sums over rows of a matrix, in a layout without one."""

    @property
    def layout(self) -> Layout:
        return "cell"


@CONSTRAINTS.caught_by(
    "sums_of_parts_add_up", "divided into 1 + 4 columns", also="given_sums_parts_are_as_in_the_whole"
)
class NormsForSums(RightPool):
    """Roots before they are added up."""

    def sums(self, w: Tensor) -> Tensor:
        return super().sums(w).sqrt()

    def project_given(self, w: Tensor, sums: Tensor) -> Tensor:
        return super().project_given(w, sums.square())

    def violation_given(self, w: Tensor, sums: Tensor) -> Tensor:
        return super().violation_given(w, sums.square())


@CONSTRAINTS.caught_by(
    "given_sums_parts_are_as_in_the_whole", "project_given() of a weight (3, 5) divided into", "is off by"
)
class OwnNormForThatOfAll(RightPool):
    """The part's own norm, where it is the whole's that counts."""

    def project_given(self, w: Tensor, sums: Tensor) -> Tensor:
        return self.project(w)


@CONSTRAINTS.caught_by("given_sums_parts_are_as_in_the_whole", "moves a weight", "where violation_given() is 0")
class GivenWithAnEpsilon(RightPool):
    """What is allowed is shrunk a little each time."""

    def project_given(self, w: Tensor, sums: Tensor) -> Tensor:
        return super().project_given(w, sums) * (1 - torch.finfo(w.dtype).eps)


@CONSTRAINTS.caught_by("given_sums_parts_are_as_in_the_whole", "project_given() of a weight", "torch.float32")
class GivenStaysWide(RightPool):
    """A half-precision part comes back in float32."""

    def project_given(self, w: Tensor, sums: Tensor) -> Tensor:
        return at_least_float32(super().project_given(w, sums))


@CONSTRAINTS.caught_by("given_sums_parts_are_as_in_the_whole", "the worst violation_given() of a weight")
class ViolationInSquares(RightPool):
    """Squared norms over a bound on norms: another unit."""

    def violation_given(self, w: Tensor, sums: Tensor) -> Tensor:
        return (sums - self.largest**2).clamp(min=0).amax()


@CONSTRAINTS.caught_by("given_sums_parts_are_as_in_the_whole", "violation_given() of a weight", "(3, 1)")
class ViolationOfEachRow(RightPool):
    """A number for each row."""

    def violation_given(self, w: Tensor, sums: Tensor) -> Tensor:
        return (sums.sqrt() - self.largest).clamp(min=0)


@CONSTRAINTS.caught_by(
    "weight_is_left_alone", "project_given() wrote into", also="given_sums_parts_are_as_in_the_whole"
)
class GivenInPlace(RightPool):
    """A part that is scaled where it lies."""

    def project_given(self, w: Tensor, sums: Tensor) -> Tensor:
        return w.copy_(super().project_given(w, sums))


@CONSTRAINTS.caught_by("nan_is_never_hidden", "violation_given() of a torch.float64 weight (3, 5) with a NaN")
class NanOfAnotherPartHidden(RightPool):
    """A comparison, which a NaN elsewhere in the row does not pass."""

    def violation_given(self, w: Tensor, sums: Tensor) -> Tensor:
        norms = sums.sqrt()
        return torch.where(norms > self.largest, norms - self.largest, 0.0).amax()


@CONSTRAINTS.caught_by("never_waits_for_the_device", "violation_given() of a fake weight", also="stays_on_its_device")
class ReadsTheSums(RightPool):
    """A number of the sums, read back."""

    def violation_given(self, w: Tensor, sums: Tensor) -> Tensor:
        return sums.new_zeros(()) if float(sums.max()) < 1e-9 else super().violation_given(w, sums)


# --- activity penalties ----------------------------------------------------------------------------------------------

ACTIVITIES = Mutants()


@ACTIVITIES.caught_by("outputs_side_by_side_add_up", "of the mean over 3 outputs side by side, times 3")
class RootOfTheMean(Squares):
    """The root of the mean of h² + 1/2: no sum over outputs, but the same for a batch twice as large."""

    separable: ClassVar[bool] = True

    reduction: Literal["mean"] = "mean"  # type: ignore[assignment]  # of three, only one is meant
    """The one reduction of which a root makes sense."""

    def value(self, activity: Activity) -> Tensor:
        return activity.reduce(lambda h: h.square() + 0.5, "mean").sqrt()


@ACTIVITIES.caught_by("outputs_side_by_side_add_up", "the value of the mean over the steps of a loop in one sequence")
class StepsWithoutLengthsLeftOut(RightChange):
    """The neighbours of a cell in a loop are missed, unless lengths are known."""

    separable: ClassVar[bool] = True

    def value(self, activity: Activity) -> Tensor:
        known = [one for one in activity.segments if not isinstance(one, Stepped) or one.pair_valid is not None]
        return super().value(Activity(known)) if known else 0.0 * super().value(activity)


# --- right in all ----------------------------------------------------------------------------------------------------


class Disc(RightPool):
    """The norm of each column at most `largest`."""

    kind: Literal["disc"] = "disc"  # type: ignore[assignment]  # Right has a name of its own
    ranks: ClassVar[tuple[int, ...]] = (1, 2)

    @property
    def pooled(self) -> tuple[int, ...] | None:
        return (0,)

    def sums(self, w: Tensor) -> Tensor:
        return at_least_float32(w).square().sum(0, keepdim=True)

    def project(self, w: Tensor) -> Tensor:
        norms = norms_of(w, dim=0)
        return scaled(w, norms, norms.clamp(max=self.largest))

    def violation(self, w: Tensor) -> Tensor:
        return (norms_of(w, dim=0) - self.largest).clamp(min=0).amax()


RIGHT = [RightPool, Disc]
