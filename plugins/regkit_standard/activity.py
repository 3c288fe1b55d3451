"""Activity penalties: on the size of the outputs, and on their change in time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from regkit import Activity, ActivityPenalty, hookimpl
from regkit.fields import NonNegative


@final
class ActivityL1(ActivityPenalty):
    """L1 of outputs: |h|, reduced over the valid ones  (Keras activity_regularizer L1, at `reduction` batch).

    >>> from regkit.activity import Stepped
    >>> ActivityL1(strength=1).value(Activity([Stepped(torch.tensor([[1.0, -2.0]]))]))
    tensor(1.5000)
    """

    kind: Literal["activity_l1"] = "activity_l1"

    separable: ClassVar[bool] = True

    def value(self, activity: Activity) -> Tensor:
        return activity.reduce(torch.abs, self.reduction, lambda h, scratch: torch.abs(h, out=scratch(h)).sum())

    def add_gradients(self, activity: Activity, gradients: Activity, amount: Tensor) -> None:
        activity.add_slopes(gradients, torch.sign, amount, self.reduction)


@final
class ActivityL2(ActivityPenalty):
    """L2 of outputs (AR): h², reduced over the valid ones  (Merity et al. 2017, §4.6, there after dropout; Keras L2).

    >>> from regkit.activity import Stepped
    >>> ActivityL2(strength=1).value(Activity([Stepped(torch.tensor([[1.0, -2.0]]))]))
    tensor(2.5000)
    """

    kind: Literal["activity_l2"] = "activity_l2"

    separable: ClassVar[bool] = True

    def value(self, activity: Activity) -> Tensor:
        return activity.reduce(torch.square, self.reduction, _squares)

    def add_gradients(self, activity: Activity, gradients: Activity, amount: Tensor) -> None:
        activity.add_slopes(gradients, lambda h: h, amount, self.reduction, times=2)


@final
class ActivityL1L2(ActivityPenalty):
    """Elastic net of outputs: l1·|h| + l2·h², reduced over the valid ones  (Keras ActivityRegularization, at `batch`).

    >>> from regkit.activity import Stepped
    >>> ActivityL1L2(l1=1.0, l2=2.0).value(Activity([Stepped(torch.tensor([[1.0, -2.0]]))]))
    tensor(6.5000)
    """

    kind: Literal["activity_l1_l2"] = "activity_l1_l2"

    separable: ClassVar[bool] = True

    shorthand: ClassVar[tuple[str, ...]] = ("l1", "l2")

    l1: NonNegative = 0.0
    """The coefficient of |h|. Range: ≥ 0."""

    l2: NonNegative = 0.0
    """The coefficient of h². Range: ≥ 0."""

    strength: NonNegative = 1.0
    """What both coefficients are multiplied by. Range: ≥ 0; a rule with 0 is refused."""

    @classmethod
    def examples(cls) -> Sequence[ActivityL1L2]:
        return [cls(l1=0.5, l2=0.25), cls(l1=0.5), cls(l2=0.25, strength=2.0)]

    def inert(self) -> str | None:
        return "neither l1 nor l2 is positive" if self.l1 == self.l2 == 0 else super().inert()

    def value(self, activity: Activity) -> Tensor:
        return activity.reduce(lambda h: self.l1 * h.abs() + self.l2 * h.square(), self.reduction)

    def add_gradients(self, activity: Activity, gradients: Activity, amount: Tensor) -> None:
        def slope(h: Tensor) -> Tensor:
            return h.sign().mul_(self.l1).add_(h, alpha=2 * self.l2)

        activity.add_slopes(gradients, slope, amount, self.reduction)


@final
class Temporal(ActivityPenalty):
    """Temporal L2 (TAR): (h_t − h_{t−1})², reduced over valid neighbours  (Merity et al. 2017, §4.6, as released).

    >>> from regkit.activity import Sequenced
    >>> Temporal(strength=1).value(Activity([Sequenced(torch.tensor([[[1.0]], [[3.0]], [[0.0]]]))]))
    tensor(6.5000)
    """

    kind: Literal["temporal"] = "temporal"

    separable: ClassVar[bool] = True

    sequence: ClassVar[bool] = True

    def value(self, activity: Activity) -> Tensor:
        def total(h: Tensor, previous: Tensor, scratch: Callable[[Tensor], Tensor]) -> Tensor:
            change = torch.sub(h, previous, out=scratch(h)).reshape(-1)
            return torch.dot(change, change)

        return activity.reduce_pairs(lambda h, previous: (h - previous).square(), self.reduction, total)

    def add_gradients(self, activity: Activity, gradients: Activity, amount: Tensor) -> None:
        activity.add_pair_slopes(gradients, torch.sub, amount, self.reduction, times=2)


@final
class NormStabilizer(ActivityPenalty):
    """Norm stabilizer: (‖h_t‖ − ‖h_{t−1}‖)², reduced over valid neighbours  (Krueger & Memisevic 2015).

    Each direction of a bidirectional module is a state of its own. The norm of a zero state has a zero gradient.

    >>> from regkit.activity import Sequenced
    >>> NormStabilizer(strength=1).value(Activity([Sequenced(torch.tensor([[[3.0, 4.0]], [[0.0, 2.0]]]))]))
    tensor(9.)
    """

    kind: Literal["norm_stabilizer"] = "norm_stabilizer"

    separable: ClassVar[bool] = True

    sequence: ClassVar[bool] = True

    def value(self, activity: Activity) -> Tensor:
        return activity.reduce_pairs(lambda h, previous: (_norm(h) - _norm(previous)).square(), self.reduction)

    def add_gradients(self, activity: Activity, gradients: Activity, amount: Tensor) -> None:
        def slope(h: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
            ours, theirs = _norm(h), _norm(previous)
            growth = ours - theirs
            return _unit(h, ours, growth), _unit(previous, theirs, -growth)

        activity.add_pair_slopes(gradients, slope, amount, self.reduction, times=2, per_row=True)


def _squares(h: Tensor, scratch: Callable[[Tensor], Tensor]) -> Tensor:
    """Σh²  -> ()."""
    if not h.is_contiguous():
        return torch.square(h, out=scratch(h)).sum()
    flat = h.view(-1)
    return torch.dot(flat, flat)


def _norm(h: Tensor) -> Tensor:
    """(..., features) -> (..., 1); torch defines the derivative of the 2-norm as 0 at 0."""
    norm: Tensor = torch.linalg.vector_norm(h, dim=-1, keepdim=True)
    return norm


def _unit(h: Tensor, norm: Tensor, times: Tensor) -> Tensor:
    """times · h / ‖h‖, which is 0 where h is."""
    return h * torch.where(norm == 0, 0.0, times / norm)


@hookimpl
def regkit_activity_penalties() -> list[type[ActivityPenalty]]:
    return [ActivityL1, ActivityL2, ActivityL1L2, Temporal, NormStabilizer]
