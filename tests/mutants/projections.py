"""Constraints that treat tensors and lists of them wrongly, each with the law that catches it and what it tells."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from tests.mutants.constraints import Mutant, Right, Sphere, norms_of, scaled

LOGGER = logging.getLogger(__name__)


class Unguarded(Right):
    def project(self, w: Tensor) -> Tensor:
        norms = norms_of(w)
        return (w * (norms.clamp(max=self.largest) / norms)).to(w.dtype)


class GuardedAtZeroAlone(Sphere):
    ranks: ClassVar[tuple[int, ...]] = (1,)

    def project(self, w: Tensor) -> Tensor:
        norm = norms_of(w, dim=0)
        return (w * torch.where(norm > 0, 1 / norm, 1.0)).to(w.dtype)


class NanToNumber(Right):
    def project(self, w: Tensor) -> Tensor:
        return super().project(w).nan_to_num()


class NanComparedAway(Right):
    def violation(self, w: Tensor) -> Tensor:
        norms = norms_of(w)
        return torch.where(norms > self.largest, norms - self.largest, 0.0).amax()


class InPlace(Right):
    def project(self, w: Tensor) -> Tensor:
        norms = norms_of(w)
        return w.mul_(torch.where(norms > self.largest, self.largest / norms, 1.0))


class ReadsBack(Right):
    def project(self, w: Tensor) -> Tensor:
        return w.clone() if float(self.violation(w)) == 0 else super().project(w)


class TakesByMask(Right):
    def project(self, w: Tensor) -> Tensor:
        point, long = w.clone(), norms_of(w).squeeze(-1) > self.largest
        point[long] = w[long] * (self.largest / norms_of(w)[long]).to(w.dtype)
        return point


class NormInHalf(Right):
    def project(self, w: Tensor) -> Tensor:
        norms = w.square().sum(-1, keepdim=True).sqrt()
        return scaled(w, norms, norms.clamp(max=self.largest))


class Rebinds(Right):
    def project_(self, weights: Sequence[Tensor]) -> None:
        for w in weights:
            w = self.project(w)  # the mistake


class Replaces(Right):
    def project_(self, weights: Sequence[Tensor]) -> None:
        weights[:] = [self.project(w) for w in weights]  # the mistake


class OneScaleForTheList(Right):
    def project_(self, weights: Sequence[Tensor]) -> None:
        largest = torch.stack([norms_of(w).amax() for w in weights]).amax()
        for w in weights:
            w.mul_((self.largest / largest).clamp(max=1))


class MovesAllInTheList(Right):
    def project_(self, weights: Sequence[Tensor]) -> None:
        for w in weights:
            w.copy_(self.project(w)).mul_(1 - torch.finfo(w.dtype).eps)


class RandomStart(Right):
    def violation(self, w: Tensor) -> Tensor:
        return super().violation(w) * torch.rand(()).clamp(min=0.5)


class StaysWide(Right):
    def project(self, w: Tensor) -> Tensor:
        norms = norms_of(w)
        return w * torch.where(norms > self.largest, self.largest / norms, 1.0)


class Flattens(Right):
    def project(self, w: Tensor) -> Tensor:
        rows = w.view(-1).view(w.shape)
        return super().project(rows)


class MadeOnTheCpu(Right):
    def project(self, w: Tensor) -> Tensor:
        norms = norms_of(w)
        return scaled(w, norms, torch.minimum(norms, torch.full((w.size(0), 1), self.largest, dtype=norms.dtype)))


class Logs(Right):
    def project(self, w: Tensor) -> Tensor:
        LOGGER.debug("a weight of %d rows", w.size(0))
        return super().project(w)


MUTANTS = [
    Mutant(Unguarded, "finite_at_zero", ("that is zero", "nan")),
    Mutant(GuardedAtZeroAlone, "finite_at_zero", ("tiny entry", "inf")),
    Mutant(NanToNumber, "nan_is_never_hidden", ("project()", "NaN", "makes 0 of it")),
    Mutant(NanComparedAway, "nan_is_never_hidden", ("violation()", "NaN")),
    Mutant(InPlace, "weight_is_left_alone", ("project() wrote into",)),
    Mutant(ReadsBack, "never_waits_for_the_device", ("project()", "_local_scalar_dense")),
    Mutant(TakesByMask, "never_waits_for_the_device", ("project()", "nonzero")),
    Mutant(NormInHalf, "halves_accumulate_in_float32", ("float16", "off by", "where float64 has")),
    Mutant(Rebinds, "list_form_agrees", ("project_()", "off by")),
    Mutant(Replaces, "list_form_agrees", ("another tensor in the place",)),
    Mutant(OneScaleForTheList, "list_form_agrees", ("project_()", "off by")),
    Mutant(MovesAllInTheList, "list_form_agrees", ("that project() leaves alone",)),
    Mutant(RandomStart, "draws_no_random_numbers", ("torch",)),
    Mutant(StaysWide, "keeps_shape_and_dtype", ("float16", "is torch.float32")),
    Mutant(Flattens, "strides_do_not_matter", ("view",)),
    Mutant(MadeOnTheCpu, "stays_on_its_device", ("project()", "meta")),
    Mutant(Logs, "compiles_whole", ("project() does not compile", "logg")),
]
