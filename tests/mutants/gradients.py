"""Penalties whose gradient is wrong, or lost, each with the law that catches it."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from regkit import Penalty
from regkit.activity import at_least_float32
from tests.mutants.kinds import Ridge
from tests.mutants.mutant import Mutants
from tests.mutants.penalties import GroupLasso

MUTANTS = Mutants()

WRONG_EITHER_WAY = "gradient_is_the_slope_of_the_value"


@MUTANTS.caught_by(
    "value_keeps_the_graph",
    "does not require one",
    also="gradient_is_that_of_autograd gradient_is_finite_at_zero list_forms_agree",
)
class Detached(Ridge):
    """Right at the step, and of no effect in the loss."""

    def value(self, w: Tensor) -> Tensor:
        return super().value(w.detach())

    def gradient(self, w: Tensor) -> Tensor:
        return 2 * at_least_float32(w)


@MUTANTS.caught_by(
    "value_keeps_the_graph",
    "numpy() on Tensor that requires grad",
    also="gradient_is_that_of_autograd gradient_is_finite_at_zero list_forms_agree never_waits_for_the_device "
    "stays_on_its_device",
)
class InNumPy(Ridge):
    """Mathematics that torch does not see."""

    def value(self, w: Tensor) -> Tensor:
        return torch.as_tensor((at_least_float32(w).numpy() ** 2).sum())

    def gradient(self, w: Tensor) -> Tensor:
        return 2 * at_least_float32(w.detach())


@MUTANTS.caught_by(
    "gradient_fits_the_weight", "has shape (1, 5)", also=f"{WRONG_EITHER_WAY} gradient_is_that_of_autograd"
)
class GradientBroadcasts(Penalty):
    """Σ of the squared column sums, whose gradient is the same in every row: but each row needs one."""

    kind: Literal["column_sums"] = "column_sums"
    ranks: ClassVar[tuple[int, ...]] = (2,)

    def value(self, w: Tensor) -> Tensor:
        return at_least_float32(w).sum(dim=0).square().sum()

    def gradient(self, w: Tensor) -> Tensor:
        return 2 * at_least_float32(w).sum(dim=0, keepdim=True)


@MUTANTS.caught_by("gradient_fits_the_weight", "torch.float16, not torch.float32")
class GradientInHalf(Ridge):
    """2w in half precision overflows beyond 32752."""

    def gradient(self, w: Tensor) -> Tensor:
        return 2 * w


@MUTANTS.caught_by("gradient_is_that_of_autograd", "where autograd is", also=WRONG_EITHER_WAY)
class WrongSign(Ridge):
    """It makes weights grow."""

    def gradient(self, w: Tensor) -> Tensor:
        return -2 * at_least_float32(w)


@MUTANTS.caught_by("gradient_is_that_of_autograd", "gradient()[", also=WRONG_EITHER_WAY)
class FactorForgotten(Ridge):
    """The gradient of ½Σw²."""

    def gradient(self, w: Tensor) -> Tensor:
        return at_least_float32(w)


@MUTANTS.caught_by("gradient_is_that_of_autograd", "where autograd is", also=WRONG_EITHER_WAY)
class WrongAxis(GroupLasso):
    """Columns divided by their norms, where the value sums those of rows."""

    ranks: ClassVar[tuple[int, ...]] = (2,)

    def gradient(self, w: Tensor) -> Tensor:
        norms = self.norms(at_least_float32(w).T)
        return at_least_float32(w) / torch.where(norms == 0, 1.0, norms)


@MUTANTS.caught_by("gradient_is_the_slope_of_the_value", "where the slope is")
class ScaleDetached(Penalty):
    """A variation relative to the size of the weight, of which autograd is not told that it changes with it."""

    kind: Literal["variation"] = "variation"

    def value(self, w: Tensor) -> Tensor:
        w = at_least_float32(w)
        squares = w.square().sum()
        return (w - w.mean()).square().sum() / (1 + squares.detach())


@MUTANTS.caught_by(
    "gradient_is_the_slope_of_the_value",
    "where the slope is",
    also="value_is_a_scalar strides_do_not_matter",
)
class RoundsToFloat32(Ridge):
    """float64 weights are read in float32."""

    def value(self, w: Tensor) -> Tensor:
        return w.float().square().sum()


AT_ZERO = "finite_at_every_scale"  # zero is one


@MUTANTS.caught_by(
    "gradient_is_finite_at_zero", "of a torch.float16 weight (3, 5) that is zero has [nan]", also=AT_ZERO
)
class NormUnguarded(GroupLasso):
    """The root of a sum of squares, whose slope at 0 is infinite."""

    def norms(self, w: Tensor) -> Tensor:
        return w.reshape(w.size(0), -1).square().sum(dim=1).sqrt()


@MUTANTS.caught_by("gradient_is_finite_at_zero", "(3, 5) that is zero has [nan]", also=AT_ZERO)
class GuardedOutside(GroupLasso):
    """Guarded outside of the root alone: autograd multiplies the infinite slope by 0."""

    def norms(self, w: Tensor) -> Tensor:
        squares = w.reshape(w.size(0), -1).square().sum(dim=1)
        return torch.where(squares == 0, 0.0, squares.sqrt())
