"""Penalties whose proximal operator is wrong, each with the law that catches it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from regkit import Penalty
from regkit.activity import at_least_float32
from tests.mutants.mutant import Mutants
from tests.mutants.penalties import GroupLasso

MUTANTS = Mutants()


class Lasso(Penalty):
    """Σ|w|, as it should be."""

    kind: Literal["lasso"] = "lasso"

    def value(self, w: Tensor) -> Tensor:
        return at_least_float32(w).abs().sum()

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        return w.sign() * (w.abs() - step).clamp(min=0)


class ProximalGroups(GroupLasso):
    """Each row moved towards 0 by the step, as it should be."""

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        norms = self.norms(at_least_float32(w)).view(-1, *[1] * (w.dim() - 1))
        return (w * (1 - step / torch.where(norms == 0, 1.0, norms)).clamp(min=0)).to(w.dtype)


@MUTANTS.caught_by(
    "prox_fits_the_weight", "of a torch.float16 weight", "torch.float32", also="prox_takes_a_tensor_for_its_step"
)
class ComesBackWide(Lasso):
    """Half-precision weights come back in float32."""

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        return super().prox(at_least_float32(w), step)


@MUTANTS.caught_by("prox_fits_the_weight", "torch.float16 weight (384, 384) is off")
class SumsInHalf(ProximalGroups):
    """The norms of rows summed in half precision."""

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        rows = w.reshape(w.size(0), -1)
        norms = rows.abs().mul(16).square().sum(dim=1).sqrt().div(16).view(-1, *[1] * (w.dim() - 1))
        return w * (1 - step / torch.where(norms == 0, 1.0, norms)).clamp(min=0)


@MUTANTS.caught_by("prox_at_step_zero_is_the_identity", "at step 0.0 it moves", also="prox_is_the_minimum")
class StepForgotten(Lasso):
    """The same threshold at every learning rate."""

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        return super().prox(w, 0.1)


@MUTANTS.caught_by("prox_is_the_minimum", "at step 0.001", "away from it has")
class StepSquared(Lasso):
    """The learning rate multiplied in once more."""

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        return super().prox(w, step * step)


@MUTANTS.caught_by("prox_is_the_minimum", "F(prox) =")
class FactorForgotten(Penalty):
    """Σw² with the operator of ½Σw²."""

    kind: Literal["ridge"] = "ridge"

    def value(self, w: Tensor) -> Tensor:
        return at_least_float32(w).square().sum()

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        return w / (1 + step)


@MUTANTS.caught_by("prox_never_expands", "two weights", also="prox_is_the_minimum prox_fits_the_weight")
class HardThreshold(Lasso):
    """What is beyond the threshold stays where it is."""

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        return torch.where(w.abs() <= step, 0.0, w)


@MUTANTS.caught_by("prox_takes_a_tensor_for_its_step", "with step 0.001 as a tensor", "torch.float64 weight")
class RoundsTheStep(Lasso):
    """Made a tensor, of float32 where it was a plain number."""

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        return super().prox(w, torch.as_tensor(step, device=w.device))


@MUTANTS.caught_by("never_waits_for_the_device", "prox() of a fake weight", also="stays_on_its_device")
class WantsAFloat(Lasso):
    """torch's own soft threshold, which takes a plain number, and so reads back a tensor."""

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        return torch.nn.functional.softshrink(w, step)


@MUTANTS.caught_by("prox_is_finite_at_zero", "weight (3, 5) that is zero", "not finite")
class DividesByTheNorm(ProximalGroups):
    """0/0 where a row is zero already."""

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        norms = self.norms(at_least_float32(w)).view(-1, *[1] * (w.dim() - 1))
        return (w / norms * (norms - step).clamp(min=0)).to(w.dtype)


@MUTANTS.caught_by("nan_is_never_hidden", "prox() of a", "makes 0 of it")
class HidesNaN(Lasso):
    """A NaN is not beyond the threshold, and is made 0."""

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        return torch.where(w.abs() > step, w - step * w.sign(), 0.0)


@MUTANTS.caught_by("weight_is_left_alone", "prox() wrote into a", also="prox_fits_the_weight prox_is_the_minimum")
class InPlace(Lasso):
    """The threshold is taken off the weight itself."""

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        return w.copy_(super().prox(w, step))
