"""Activity penalties that are wrong in the ways that authors get them wrong, each with the law that catches it and what
it tells. `Right` and `RightChange` are what most of them wanted to be."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from regkit import Activity, ActivityPenalty
from regkit.activity import Sequenced

LOGGER = logging.getLogger(__name__)


class Right(ActivityPenalty):
    """h², reduced over the valid outputs."""

    kind: Literal["right"] = "right"

    def value(self, activity: Activity) -> Tensor:
        return activity.reduce(torch.square, self.reduction)


class RightChange(ActivityPenalty):
    """The growth of h, squared, reduced over valid neighbours."""

    kind: Literal["right_change"] = "right_change"
    sequence: ClassVar[bool] = True

    def value(self, activity: Activity) -> Tensor:
        return activity.reduce_pairs(lambda h, before: (h - before).relu().square(), self.reduction)


class CountsPadding(Right):
    def value(self, activity: Activity) -> Tensor:
        return torch.cat([h.flatten() for h in activity.values()]).square().mean()


class DividesByTimeToo(Right):
    def value(self, activity: Activity) -> Tensor:
        return super().value(activity) / next(activity.values()).size(0)


class AlwaysTheSum(Right):
    def value(self, activity: Activity) -> Tensor:
        return activity.reduce(torch.square, "sum")


class MeanOfTheBatchOnly(Right):
    def value(self, activity: Activity) -> Tensor:
        return activity.reduce(torch.square, "mean" if self.reduction == "batch" else self.reduction)


class Detached(Right):
    def value(self, activity: Activity) -> Tensor:
        return activity.reduce(lambda h: h.detach().square(), self.reduction)


class _Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        return h.square()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, slope: Tensor) -> Tensor:
        (h,) = ctx.saved_tensors
        return slope * h


class MissesAFactor(Right):
    def value(self, activity: Activity) -> Tensor:
        return activity.reduce(_Halved.apply, self.reduction)


class LastStepOnly(Right):
    def value(self, activity: Activity) -> Tensor:
        return torch.stack([h[-1].square().mean() for h in activity.values()]).mean()


class FirstSegmentOnly(Right):
    def value(self, activity: Activity) -> Tensor:
        return Activity(activity.segments[:1]).reduce(torch.square, self.reduction)


class InPlace(Right):
    def value(self, activity: Activity) -> Tensor:
        return activity.reduce(lambda h: h.abs_(), self.reduction)


class NeighboursInTheBatch(Right):
    sequence: ClassVar[bool] = True

    def value(self, activity: Activity) -> Tensor:
        return torch.stack([h.diff(dim=-2).square().sum() for h in activity.values()]).sum()


class OneTimeForBoth(RightChange):
    def value(self, activity: Activity) -> Tensor:
        forward = [Sequenced(*segment.values()) for segment in activity.segments]
        return super().value(Activity(forward))


class LayersOnly(RightChange):
    def value(self, activity: Activity) -> Tensor:
        whole = [segment for segment in activity.segments if isinstance(segment, Sequenced)]
        return super().value(Activity(whole)) if whole else next(activity.values()).new_zeros(()).double()


class MeanOfNothing(RightChange):
    def value(self, activity: Activity) -> Tensor:
        pairs = [pair for segment in activity.segments if (pair := segment.pairs()) is not None]
        return sum((h - before).square().mean() for h, before, _ in pairs)


class Overflows(Right):
    def value(self, activity: Activity) -> Tensor:
        return activity.reduce(lambda h: h.exp() - h, self.reduction)


class Reward(Right):
    def value(self, activity: Activity) -> Tensor:
        return -super().value(activity)


class ByFeature(Right):
    def value(self, activity: Activity) -> Tensor:
        return torch.stack([h.square().mean((0, 1)) for h in activity.values()]).sum(0)


class NarrowValue(Right):
    def value(self, activity: Activity) -> Tensor:
        return super().value(activity).to(next(activity.values()).dtype)


class SumsInHalf(Right):
    def value(self, activity: Activity) -> Tensor:
        parts = [h.square().sum() / h.numel() for h in activity.values()]
        return torch.stack(parts).sum().float()


class HidesNan(Right):
    def value(self, activity: Activity) -> Tensor:
        return activity.reduce(lambda h: h.square().nan_to_num(), self.reduction)


class RootAtZero(Right):
    def value(self, activity: Activity) -> Tensor:
        return activity.reduce(lambda h: h.square().sum(-1, keepdim=True).sqrt(), self.reduction)


class StrengthTwice(Right):
    def value(self, activity: Activity) -> Tensor:
        return self.strength * super().value(activity)


class ReadsBack(Right):
    def value(self, activity: Activity) -> Tensor:
        value = super().value(activity)
        return value if float(value.detach()) > 1e-3 else value * 0


class NotCalledSequence(RightChange):
    sequence: ClassVar[bool] = False


class CalledSequence(Right):
    sequence: ClassVar[bool] = True


class MaskedAfterwards(Right):
    def value(self, activity: Activity) -> Tensor:
        total = count = 0
        for segment in activity.segments:
            h, valid = segment.values()
            valid = torch.ones_like(h, dtype=torch.bool) if valid is None else valid.expand_as(h)
            total, count = total + torch.where(valid, h.square(), 0.0).sum(), count + valid.sum()
        return total / count


class MaskedByZero(Right):
    def value(self, activity: Activity) -> Tensor:
        total = count = 0
        for segment in activity.segments:
            h, valid = segment.values()
            valid = torch.ones_like(h) if valid is None else valid.expand_as(h).to(h.dtype)
            total, count = total + (h.square() * valid).sum(), count + valid.sum()
        return total / count


class MadeOnTheCpu(Right):
    def value(self, activity: Activity) -> Tensor:
        return activity.reduce(lambda h: h.square() * torch.linspace(0.5, 1.5, h.size(-1)).to(h.dtype), self.reduction)


class Logs(Right):
    def value(self, activity: Activity) -> Tensor:
        LOGGER.debug("%d segments", len(activity.segments))
        return super().value(activity)


class Noisy(Right):
    def value(self, activity: Activity) -> Tensor:
        return activity.reduce(lambda h: torch.nn.functional.dropout(h, 0.5).square(), self.reduction)


class MissesTwo(Right):
    def add_gradients(self, activity: Activity, gradients: Activity, amount: Tensor) -> None:
        activity.add_slopes(gradients, lambda h: h, amount, self.reduction)


class AlwaysTheMean(Right):
    def add_gradients(self, activity: Activity, gradients: Activity, amount: Tensor) -> None:
        activity.add_slopes(gradients, lambda h: h, amount, times=2)


class PaddingHasASlope(Right):
    def add_gradients(self, activity: Activity, gradients: Activity, amount: Tensor) -> None:
        whole = [Sequenced(*segment.values()[:1]) for segment in activity.segments]
        Activity(whole).add_slopes(gradients, lambda h: h, amount, self.reduction, times=2)


class Overwrites(Right):
    def add_gradients(self, activity: Activity, gradients: Activity, amount: Tensor) -> None:
        for gradient in gradients.values():
            gradient.zero_()
        activity.add_slopes(gradients, lambda h: h, amount, self.reduction, times=2)


class ForgetsTheStateBefore(RightChange):
    def add_gradients(self, activity: Activity, gradients: Activity, amount: Tensor) -> None:
        def slope(h: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
            return (h - before).relu(), torch.zeros_like(before)

        activity.add_pair_slopes(gradients, slope, amount, self.reduction, times=2)


class ReadsTheAmount(Right):
    def add_gradients(self, activity: Activity, gradients: Activity, amount: Tensor) -> None:
        activity.add_slopes(gradients, lambda h: h, amount, self.reduction, times=2 * float(amount))


@dataclass(frozen=True)
class Mutant:
    """A wrong kind, the law that catches it, and words in what that law says of it."""

    kind: type[ActivityPenalty]
    law: str
    words: tuple[str, ...]


MUTANTS = [
    Mutant(CountsPadding, "layout_does_not_matter", ("packed", "padded", "(3, 5, 1, 4)")),
    Mutant(DividesByTimeToo, "layout_does_not_matter", ("mean", "packed")),
    Mutant(AlwaysTheSum, "reduces_as_it_says", ("the mean is", "of the batch twice")),
    Mutant(MeanOfTheBatchOnly, "reduces_as_it_says", ("batch is", "a share of sum is")),
    Mutant(Detached, "gradient_is_the_slope", ("carries no gradient",)),
    Mutant(MissesAFactor, "gradient_is_the_slope", ("the gradient of the mean is", "the slope of the value")),
    Mutant(LastStepOnly, "gradient_reaches_every_step", ("step 0 of sequence 0, forward",)),
    Mutant(FirstSegmentOnly, "sequences_do_not_mix", ("over its sequences one by one",)),
    Mutant(FirstSegmentOnly, "gradient_reaches_every_step", ("step 0 of sequence 0, backward",)),
    Mutant(InPlace, "outputs_are_left_alone", ("value() wrote into torch.float64 outputs",)),
    Mutant(NeighboursInTheBatch, "sequences_do_not_mix", ("over a batch is", "one by one 0")),
    Mutant(OneTimeForBoth, "time_runs_backward_too", ("two directions", "in a mirror")),
    Mutant(LayersOnly, "cells_in_a_loop_are_a_sequence", ("over the calls of a cell is 0",)),
    Mutant(MeanOfNothing, "value_is_finite", ("sequences of length 1", "nan")),
    Mutant(Overflows, "value_is_finite", ("outputs times 10000", "inf")),
    Mutant(Reward, "value_is_not_negative", ("outputs times 0.01 is -",)),
    Mutant(ByFeature, "value_is_a_scalar", ("has shape (4,), not ()",)),
    Mutant(NarrowValue, "value_is_a_scalar", ("is torch.float16, not torch.float32",)),
    Mutant(SumsInHalf, "halves_accumulate_in_float32", ("float16 outputs", "inf, where float64 has")),
    Mutant(HidesNan, "nan_is_never_hidden", ("with a NaN at",)),
    Mutant(RootAtZero, "gradient_is_finite", ("nan", "of zeros")),
    Mutant(StrengthTwice, "unit_strength", ("value() changes by 2 times its size", "from 1.0 to 3.0")),
    Mutant(ReadsBack, "never_waits_for_the_device", ("_local_scalar_dense",)),
    Mutant(MissesTwo, "closed_form_agrees", ("the gradient of the mean", "from that of autograd")),
    Mutant(AlwaysTheMean, "closed_form_agrees", ("the gradient of the batch",)),
    Mutant(PaddingHasASlope, "closed_form_agrees", ("padded",)),
    Mutant(Overwrites, "closed_form_agrees", ("off by",)),
    Mutant(ForgetsTheStateBefore, "closed_form_agrees", ("off by",)),
    Mutant(ReadsTheAmount, "never_waits_for_the_device", ("add_gradients() of fake outputs (5, 3, 4) raised",)),
    Mutant(NotCalledSequence, "sequence_says_whether_time_matters", ("sequence is False", "shuffled")),
    Mutant(CalledSequence, "sequence_says_whether_time_matters", ("sequence is True", "any order")),
    Mutant(MaskedAfterwards, "padding_has_no_part", ("padding is NaN", "gradient", "nan")),
    Mutant(MaskedByZero, "padding_has_no_part", ("the value is nan where padding is NaN",)),
    Mutant(MadeOnTheCpu, "stays_on_its_device", ("meta",)),
    Mutant(Logs, "compiles_whole", ("value() does not compile", "logging")),
    Mutant(Noisy, "draws_no_random_numbers", ("torch",)),
]
