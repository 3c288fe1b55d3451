"""Penalties that are wrong in the ways that authors get them wrong, each with the law that catches it."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

from regkit import Penalty
from regkit.activity import at_least_float32
from regkit.fields import NonNegative
from tests.mutants.kinds import Ridge
from tests.mutants.mutant import Mutants

MUTANTS = Mutants()


class GroupLasso(Penalty):
    """Σ of the norms of the rows, as it should be."""

    kind: Literal["group_lasso"] = "group_lasso"

    def value(self, w: Tensor) -> Tensor:
        return self.norms(at_least_float32(w)).sum()

    def norms(self, w: Tensor) -> Tensor:
        squares = w.reshape(w.size(0), -1).square().sum(dim=1)
        return torch.where(squares == 0, 0.0, torch.where(squares == 0, 1.0, squares).sqrt())


@MUTANTS.caught_by("takes_its_ranks", "a weight (7,) raised RuntimeError", "at least 2 dimensions")
class RanksForgotten(Penalty):
    """A matrix' norm, for biases too."""

    kind: Literal["nuclear"] = "nuclear"

    def value(self, w: Tensor) -> Tensor:
        return torch.linalg.svdvals(at_least_float32(w)).sum()


class Skew(Ridge):
    """‖w + wᵀ‖², which is for square matrices alone, as it says."""

    ranks: ClassVar[tuple[int, ...]] = (2,)

    def fits(self, shape: tuple[int, ...]) -> str | None:
        return None if shape[0] == shape[1] else "only a square matrix has a transpose of its own shape"

    def value(self, w: Tensor) -> Tensor:
        w = at_least_float32(w)
        return (w + w.mT).square().sum()


@MUTANTS.caught_by(
    "says_what_it_fits", "fits((3, 5)) is None", "a weight (3, 5) raised RuntimeError", also="takes_its_ranks"
)
class FitsTooMuch(Skew):
    """It lets pass what its mathematics cannot take."""

    def fits(self, shape: tuple[int, ...]) -> str | None:
        return None if shape[0] > 1 else super().fits(shape)


@MUTANTS.caught_by("says_what_it_fits", "fits((3, 5)) gives False", also="takes_its_ranks has_an_effect")
class FitsWithABoolean(Skew):
    """It answers as a predicate would."""

    def fits(self, shape: tuple[int, ...]) -> str | None:
        return shape[0] == shape[1]  # type: ignore[return-value]  # the mistake


@MUTANTS.caught_by("says_what_it_fits", "refuses every weight of ranks (2,)", also="takes_its_ranks has_an_effect")
class FitsNothing(Skew):
    """It refuses all that there is."""

    def fits(self, shape: tuple[int, ...]) -> str | None:
        return "too small" if shape[0] < 1000 else super().fits(shape)


@MUTANTS.caught_by("takes_its_ranks", "asks for a matrix")
class RefusesWithAnotherError(Ridge):
    """It refuses a rank that it declares."""

    def value(self, w: Tensor) -> Tensor:
        if w.dim() == 1:
            raise ValueError("asks for a matrix")
        return super().value(w)


@MUTANTS.caught_by(
    "value_is_a_scalar",
    "has shape (3,), not ()",
    also="stateless deterministic draws_no_random_numbers unit_strength finite_at_every_scale value_is_not_negative "
    "has_an_effect nan_is_never_hidden weight_is_left_alone strides_do_not_matter halves_accumulate_in_float32 "
    "never_waits_for_the_device stays_on_its_device list_forms_agree value_keeps_the_graph gradient_fits_the_weight "
    "gradient_is_that_of_autograd gradient_is_the_slope_of_the_value gradient_is_finite_at_zero",
)
class SumsOneAxis(Ridge):
    """A sum over the columns alone."""

    ranks: ClassVar[tuple[int, ...]] = (2,)

    def value(self, w: Tensor) -> Tensor:
        return at_least_float32(w).square().sum(dim=-1)


@MUTANTS.caught_by("finite_at_every_scale", "value() of a torch.float32 weight", "of scale 10000.0 has [inf]")
class Overflows(Penalty):
    """A smooth maximum whose exponentials overflow."""

    kind: Literal["smooth_maximum"] = "smooth_maximum"
    signed: ClassVar[bool] = True

    def value(self, w: Tensor) -> Tensor:
        return at_least_float32(w).exp().sum().log()


@MUTANTS.caught_by("finite_at_every_scale", "gradient() of a torch.float32 weight", "of scale 10000.0")
class SlopeOverflows(Penalty):
    """Σ log cosh(w), well computed; but of its slope tanh(w), inf/inf is made."""

    kind: Literal["log_cosh"] = "log_cosh"

    def value(self, w: Tensor) -> Tensor:
        size = at_least_float32(w).abs()
        return (size + torch.nn.functional.softplus(-2 * size) - math.log(2)).sum()

    def gradient(self, w: Tensor) -> Tensor:
        return at_least_float32(w).sinh() / at_least_float32(w).cosh()


@MUTANTS.caught_by("value_is_not_negative", "-0.0", "of scale 0.01")
class Reward(Ridge):
    """What should be large, given a minus, and pushed without end."""

    def value(self, w: Tensor) -> Tensor:
        return -super().value(w)


@MUTANTS.caught_by("has_an_effect", "the value is 0 for every weight")
class WithoutEffect(Ridge):
    """A coefficient of its own, 0 unless given, of which `inert` does not know."""

    weight: NonNegative = 0.0
    """The coefficient. Range: ≥ 0."""

    def value(self, w: Tensor) -> Tensor:
        return self.weight * super().value(w)


@MUTANTS.caught_by("unit_strength", "value() changes by 2 times its size", "from 1.0 to 3.0")
class StrengthTwice(Ridge):
    """The strength is in the value, and will be multiplied in again."""

    def value(self, w: Tensor) -> Tensor:
        return self.strength * super().value(w)


@MUTANTS.caught_by("nan_is_never_hidden", "weight (3, 5) with a NaN at entry 0")
class NaNToNumber(Ridge):
    """NaN made 0, so that the loss looks fine."""

    def value(self, w: Tensor) -> Tensor:
        return super().value(w.nan_to_num())


@MUTANTS.caught_by("nan_is_never_hidden", "with a NaN at entry")
class NaNLeftOut(Ridge):
    """A threshold, which no NaN is above."""

    def value(self, w: Tensor) -> Tensor:
        return torch.where(w.abs() > 1e-3, at_least_float32(w).square(), 0.0).sum()


@MUTANTS.caught_by(
    "weight_is_left_alone",
    "value() wrote into a torch.float64 weight (3, 5)",
    also="unit_strength list_forms_agree",
)
class CentersInPlace(Ridge):
    """The mean is taken off the weight itself."""

    def value(self, w: Tensor) -> Tensor:
        with torch.no_grad():
            w.sub_(w.mean())
        return super().value(w)


@MUTANTS.caught_by("weight_is_left_alone", "gradient() left requires_grad")
class MarksTheWeight(Ridge):
    """Autograd by hand, on the weight itself."""

    def gradient(self, w: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = at_least_float32(w).requires_grad_()
            return torch.autograd.grad(self.value(leaf), leaf)[0]


@MUTANTS.caught_by("strides_do_not_matter", "raised RuntimeError", "view", also="list_forms_agree")
class ViewsStrides(Ridge):
    """`view` wants a weight in one piece."""

    def value(self, w: Tensor) -> Tensor:
        return super().value(w.view(-1))


@MUTANTS.caught_by("halves_accumulate_in_float32", "torch.float16", "inf, where float64 has")
class SumsInHalf(Ridge):
    """Made float32 when the sum has overflowed already."""

    def value(self, w: Tensor) -> Tensor:
        return at_least_float32(w.square().sum())


NUMBERS_READ = "compiles_whole stays_on_its_device"


@MUTANTS.caught_by("never_waits_for_the_device", "_local_scalar_dense", also=NUMBERS_READ)
class ReadsTheLargest(Ridge):
    """`float(t)`: the GPU is waited for at every step."""

    def value(self, w: Tensor) -> Tensor:
        largest = float(w.detach().abs().max()) or 1.0
        return super().value(w / largest) * largest**2


@MUTANTS.caught_by("never_waits_for_the_device", "fake weight (3, 5)", also=NUMBERS_READ)
class Branches(Ridge):
    """An `if` on what a tensor holds."""

    def value(self, w: Tensor) -> Tensor:
        value = super().value(w)
        return value if value > 0 else 0.0 * value


@MUTANTS.caught_by("stays_on_its_device", "on meta raised", "device")
class MadeOnTheCPU(Penalty):
    """A unit matrix that is always on the CPU."""

    kind: Literal["orthogonal_rows"] = "orthogonal_rows"
    ranks: ClassVar[tuple[int, ...]] = (2,)

    def value(self, w: Tensor) -> Tensor:
        w = at_least_float32(w)
        return (w @ w.T - torch.eye(w.size(0), dtype=w.dtype)).square().sum()


@MUTANTS.caught_by("list_forms_agree", "add_gradients() leaves")
class AssignsGradients(Ridge):
    """What the loss' gradient was is lost."""

    def add_gradients(self, weights: list[Tensor], gradients: list[Tensor], amount: float) -> None:
        for w, gradient in zip(weights, gradients, strict=True):
            gradient.copy_(amount * self.gradient(w))


@MUTANTS.caught_by("list_forms_agree", "the loop's sum")
class AveragesWeights(Ridge):
    """The mean over weights in the place of the sum."""

    def values(self, weights: list[Tensor]) -> Tensor:
        return torch.stack([self.value(w) for w in weights]).mean()


@MUTANTS.caught_by("list_forms_agree", "does not require one")
class ListLosesTheGraph(Ridge):
    """A list form for reports alone, that is used in the loss too."""

    def values(self, weights: list[Tensor]) -> Tensor:
        with torch.no_grad():
            return super().values(weights)


@MUTANTS.caught_by("never_waits_for_the_device", "add_gradients() of a fake weight", also="stays_on_its_device")
class ListReadsBack(Ridge):
    """Weights that are zero are left out, for which each must be read back."""

    def add_gradients(self, weights: list[Tensor], gradients: list[Tensor], amount: float) -> None:
        for w, gradient in zip(weights, gradients, strict=True):
            if w.any():
                gradient.add_(self.gradient(w), alpha=amount)


@MUTANTS.caught_by("compiles_whole", "does not compile as one graph", "print")
class Prints(Ridge):
    """Something printed to look at."""

    def value(self, w: Tensor) -> Tensor:
        print(end="")
        return super().value(w)


@MUTANTS.caught_by("plus_is_the_sum", "of forgets_the_other(strength=1.0)", "whose value() is 0.5 of its size off")
class ForgetsTheOther(Ridge):
    """The other's strength is lost: of two rules on a weight one would act."""

    kind: Literal["forgets_the_other"] = "forgets_the_other"  # type: ignore[assignment]  # Ridge has a name of its own

    def plus(self, other: Penalty) -> Penalty | None:
        return self if isinstance(other, ForgetsTheOther) else None
