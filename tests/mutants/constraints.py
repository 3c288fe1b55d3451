"""Constraints that are wrong in the ways that authors get them wrong, each with the law that catches it and what it
tells. `Right` is what most of them wanted to be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from regkit import Constraint
from regkit.fields import Positive


def norms_of(w: Tensor, dim: int = -1) -> Tensor:
    wide = torch.promote_types(w.dtype, torch.float32)
    return torch.linalg.vector_norm(w, dim=dim, keepdim=True, dtype=wide)


def scaled(w: Tensor, norms: Tensor, wanted: Tensor) -> Tensor:
    factors = wanted / norms
    return (w * torch.where((factors > 0) & (factors < torch.inf), factors, 1.0)).to(w.dtype)


class Right(Constraint):
    """Each row's norm at most `largest`."""

    kind: Literal["right"] = "right"
    ranks: ClassVar[tuple[int, ...]] = (2,)
    bounds: ClassVar[tuple[str, ...]] = ("largest",)

    largest: Positive = 1.5
    """The largest norm."""

    def project(self, w: Tensor) -> Tensor:
        norms = norms_of(w)
        return scaled(w, norms, norms.clamp(max=self.largest))

    def violation(self, w: Tensor) -> Tensor:
        return (norms_of(w) - self.largest).clamp(min=0).amax()


class Sphere(Constraint):
    """Each row's norm 1."""

    kind: Literal["sphere"] = "sphere"
    ranks: ClassVar[tuple[int, ...]] = (2,)

    @property
    def convex(self) -> bool:
        return False

    def project(self, w: Tensor) -> Tensor:
        norms = norms_of(w)
        return scaled(w, norms, torch.ones_like(norms))

    def violation(self, w: Tensor) -> Tensor:
        return (norms_of(w) - 1).abs().amax()


class OneScaleForAllRows(Right):
    def project(self, w: Tensor) -> Tensor:
        norms = norms_of(w).amax().expand(w.size(0), 1)
        return scaled(w, norms, norms.clamp(max=self.largest))


class OtherAxis(Right):
    def project(self, w: Tensor) -> Tensor:
        norms = norms_of(w, dim=0)
        return scaled(w, norms, norms.clamp(max=self.largest))


class KerasEpsilon(Right):
    def project(self, w: Tensor) -> Tensor:
        norms = norms_of(w)
        return (w * (norms.clamp(max=self.largest) / (norms + 1e-7))).to(w.dtype)


class SquaredNorm(Right):
    def project(self, w: Tensor) -> Tensor:
        squares = norms_of(w).square()
        return (w * torch.where(squares > self.largest, self.largest / squares, 1.0)).to(w.dtype)


class SquaredViolation(Right):
    def violation(self, w: Tensor) -> Tensor:
        return (norms_of(w).square() - self.largest).clamp(min=0).amax()


class Symmetric(Right):
    """w = wᵀ, which only a square matrix can be, as it says."""

    kind: Literal["symmetric"] = "symmetric"
    bounds: ClassVar[tuple[str, ...]] = ()

    def fits(self, shape: tuple[int, ...]) -> str | None:
        return None if shape[0] == shape[1] else "only a square matrix has a transpose of its own shape"

    def project(self, w: Tensor) -> Tensor:
        return ((w + w.mT) / 2).to(w.dtype)

    def violation(self, w: Tensor) -> Tensor:
        wide = torch.promote_types(w.dtype, torch.float32)
        return torch.linalg.vector_norm(w.to(wide) - w.mT.to(wide)) / 2


class SymmetricWithoutASay(Symmetric):
    """It lets pass what its mathematics cannot take."""

    def fits(self, shape: tuple[int, ...]) -> str | None:
        return None


class ViolationOfTheMean(Right):
    def violation(self, w: Tensor) -> Tensor:
        return (norms_of(w).mean() - self.largest).clamp(min=0)


class SignedViolation(Right):
    def violation(self, w: Tensor) -> Tensor:
        return (norms_of(w) - self.largest).amax()


class ViolationOfEachRow(Right):
    def violation(self, w: Tensor) -> Tensor:
        return (norms_of(w) - self.largest).clamp(min=0)


class NeverViolated(Right):
    def violation(self, w: Tensor) -> Tensor:
        return w.new_zeros(())


class YesOrNo(Right):
    def violation(self, w: Tensor) -> Tensor:
        return super().violation(w).sign()


class Tolerant(Right):
    def violation(self, w: Tensor) -> Tensor:
        return (norms_of(w) - 1.01 * self.largest).clamp(min=0).amax()


class NeverContent(Sphere):
    def violation(self, w: Tensor) -> Tensor:
        return (norms_of(w) - 1).abs().amax() + 1e-12


class TooFarIn(Right):
    def project(self, w: Tensor) -> Tensor:
        norms = norms_of(w)
        return scaled(w, norms, torch.where(norms > self.largest, 0.9 * self.largest, norms))


class MostOfTheWay(Right):
    def project(self, w: Tensor) -> Tensor:
        return w.lerp(super().project(w), 0.9)


class SignLost(Constraint):
    """No negative weight."""

    kind: Literal["sign_lost"] = "sign_lost"

    def project(self, w: Tensor) -> Tensor:
        return w.abs()

    def violation(self, w: Tensor) -> Tensor:
        return (-w).clamp(min=0).amax()


class SphereOfAbsolutes(Sphere):
    def project(self, w: Tensor) -> Tensor:
        return super().project(w).abs()


class SaidToBeConvex(Sphere):
    @property
    def convex(self) -> bool:
        return True


class ForgetsABound(Right):
    bounds: ClassVar[tuple[str, ...]] = ("largest",)

    smallest: Positive = 0.5
    """The smallest norm."""

    def model_post_init(self, context: object) -> None:
        if self.smallest > self.largest:
            raise ValueError("smallest is greater than largest")


class BoundIsNoNumber(Right):
    bounds: ClassVar[tuple[str, ...]] = ("kind",)


class BoundIsMisspelt(Right):
    bounds: ClassVar[tuple[str, ...]] = ("larges",)


class AtAddsTheFactor(Right):
    def at(self, factor: float) -> Constraint:
        return self.model_copy(update={"largest": self.largest + factor - 1})


class BoundIsWrittenOut(Right):
    def project(self, w: Tensor) -> Tensor:
        norms = norms_of(w)
        return scaled(w, norms, norms.clamp(max=1.5))


@dataclass(frozen=True)
class Mutant:
    """A wrong kind, the law that catches it, and words in what that law says of it."""

    kind: type[Constraint]
    law: str
    words: tuple[str, ...]


MUTANTS = [
    Mutant(OneScaleForAllRows, "is_the_nearest_point", ("an allowed point is nearer",)),
    Mutant(OtherAxis, "leaves_allowed_weights_alone", ("violation is 0", "project moved it by")),
    Mutant(KerasEpsilon, "leaves_allowed_weights_alone", ("violation is 0", "project moved it by")),
    Mutant(KerasEpsilon, "projects_once", ("projected again, moves by another",)),
    Mutant(SquaredNorm, "leaves_allowed_weights_alone", ("violation is 0", "project moved it by")),
    Mutant(SquaredViolation, "lands_in_the_set", ("after project",)),
    Mutant(ViolationOfTheMean, "violation_sees_what_moves", ("project moves", "but violation is 0")),
    Mutant(SignedViolation, "violation_is_a_number_from_0_up", ("violation -1.5",)),
    Mutant(ViolationOfEachRow, "violation_is_a_number_from_0_up", ("(3, 1)",)),
    Mutant(NeverViolated, "violation_sees_what_moves", ("project moves", "but violation is 0")),
    Mutant(YesOrNo, "violation_sees_what_moves", ("violation is 1 there and 1 at half the way",)),
    Mutant(Tolerant, "leaves_allowed_weights_alone", ("violation is 0", "project moved it by")),
    Mutant(NeverContent, "leaves_allowed_weights_alone", ("violation is 0 at no weight that was tried",)),
    Mutant(TooFarIn, "is_the_nearest_point", ("an allowed point is nearer",)),
    Mutant(MostOfTheWay, "lands_in_the_set", ("after project",)),
    Mutant(SignLost, "is_the_nearest_point", ("an allowed point is nearer",)),
    Mutant(SphereOfAbsolutes, "no_sampled_point_is_nearer", ("an allowed point is nearer",)),
    Mutant(SaidToBeConvex, "is_the_nearest_point", ("not convex", "half way between")),
    Mutant(ForgetsABound, "bounds_scale", ("at(0.125)", "the class itself refuses")),
    Mutant(BoundIsNoNumber, "bounds_scale", ("'kind'", "no number")),
    Mutant(BoundIsMisspelt, "bounds_scale", ("'larges'", "the options are", "largest")),
    Mutant(AtAddsTheFactor, "bounds_scale", ("at(0.5)", "'largest': 1.0", "not", "0.75")),
    Mutant(BoundIsWrittenOut, "bounds_scale", ("without effect",)),
    Mutant(SymmetricWithoutASay, "says_what_it_fits", ("fits((3, 5)) is None", "a weight (3, 5) raised RuntimeError")),
]
