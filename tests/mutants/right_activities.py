"""Activity penalties of many kinds, right in all: the laws must let a stranger's good work pass."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from regkit import Activity, ActivityPenalty


class Huber(ActivityPenalty):
    """Huber's function of h: squared near 0, absolute beyond 1."""

    kind: Literal["huber"] = "huber"
    separable: ClassVar[bool] = True

    def value(self, activity: Activity) -> Tensor:
        return activity.reduce(
            lambda h: functional.huber_loss(h, torch.zeros_like(h), reduction="none"), self.reduction
        )


class Excess(ActivityPenalty):
    """(|h| − 1)², where |h| is above 1: most of a state has no gradient."""

    kind: Literal["excess"] = "excess"
    separable: ClassVar[bool] = True

    def value(self, activity: Activity) -> Tensor:
        return activity.reduce(lambda h: (h.abs() - 1).relu().square(), self.reduction)


class StateNorm(ActivityPenalty):
    """‖h_t‖, one number for each step."""

    kind: Literal["state_norm"] = "state_norm"
    separable: ClassVar[bool] = True

    def value(self, activity: Activity) -> Tensor:
        return activity.reduce(lambda h: torch.linalg.vector_norm(h, dim=-1, keepdim=True), self.reduction)


class Log(ActivityPenalty):
    """log(h² + 1/2), which is below 0 near 0, and not 0 for what is masked."""

    kind: Literal["log"] = "log"
    separable: ClassVar[bool] = True
    signed: ClassVar[bool] = True

    def value(self, activity: Activity) -> Tensor:
        return activity.reduce(lambda h: (h.square() + 0.5).log(), self.reduction)


class Turn(ActivityPenalty):
    """1 − the cosine between neighbours in time."""

    kind: Literal["turn"] = "turn"
    separable: ClassVar[bool] = True
    sequence: ClassVar[bool] = True

    def value(self, activity: Activity) -> Tensor:
        def turn(h: Tensor, before: Tensor) -> Tensor:
            return 1 - functional.cosine_similarity(h, before, dim=-1, eps=1e-6).unsqueeze(-1)

        return activity.reduce_pairs(turn, self.reduction)


RIGHT = [Huber, Excess, StateNorm, Log, Turn]
