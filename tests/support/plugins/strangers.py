"""A stranger's plugin, of which each part fails where it is told to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from torch.optim import SGD

import regkit
from regkit.activity import of_output
from tests.support.loops import Batches, loss_of


class Fault:
    """What is to fail, at the n-th call from now on; counted down."""

    after: ClassVar[dict[str, int]] = {}

    @classmethod
    def may(cls, place: str) -> None:
        if place in cls.after:
            cls.after[place] -= 1
            if cls.after[place] < 0:
                raise ZeroDivisionError(place)


class Squares(regkit.Penalty):
    """L2, as a stranger writes it."""

    kind: Literal["squares"] = "squares"

    def value(self, w: Tensor) -> Tensor:
        Fault.may("value")
        return w.square().sum()

    def gradient(self, w: Tensor) -> Tensor:
        Fault.may("gradient")
        return 2 * w

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        Fault.may("prox")
        return w / (1 + 2 * step)


class Ball(regkit.Constraint):
    """Rows in a ball, as a stranger writes it."""

    kind: Literal["ball"] = "ball"
    scalable: ClassVar[bool] = False

    def project(self, w: Tensor) -> Tensor:
        Fault.may("project")
        return w.renorm(2, 0, 0.4)

    def violation(self, w: Tensor) -> Tensor:
        Fault.may("violation")
        return (w.norm(dim=1).amax() - 0.4).clamp(min=0)


class Mean(regkit.ActivityPenalty):
    """Mean square, as a stranger writes it."""

    kind: Literal["mean"] = "mean"

    def value(self, activity: regkit.Activity) -> Tensor:
        Fault.may("activity")
        return activity.reduce(lambda h: h.square(), self.reduction)


class Slow(regkit.Schedule):
    """Half, as a stranger writes it."""

    kind: Literal["slow"] = "slow"

    def factor(self, step: int) -> float:
        Fault.may("factor")
        return 0.5


class Layer(nn.RNN):
    """A recurrent layer of a stranger's own."""


class Reader(regkit.Adapter):
    """Its adapter."""

    modules: ClassVar[tuple[type[nn.Module], ...]] = (Layer,)

    def weights(self, module: nn.Module) -> Sequence[regkit.Weight]:
        return [regkit.Weight(("weight_hh_l0",), "recurrent")]

    def outputs(self, module: nn.Module) -> Sequence[regkit.Output]:
        return [regkit.Output("output", sequence=True)]

    def observe(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> Mapping[str, Any]:
        Fault.may("observe")
        return {"output": result[0]}

    def starts(self, observed: Mapping[str, Any]) -> bool:
        Fault.may("starts")
        return False

    def segments(
        self,
        module: nn.Module,
        site: regkit.OutputSite,
        observed: Mapping[str, Any],
        valid: regkit.Validity | None,
        step: int,
    ) -> Sequence[regkit.Segment]:
        Fault.may("segments")
        only = ("forward",)
        return of_output(observed["output"], batch_first=False, directions=only, wanted=only, valid=valid)


class Plugin:
    """All of it."""

    @regkit.hookimpl
    def regkit_adapters(self) -> list[regkit.Adapter]:
        return [Reader()]

    @regkit.hookimpl
    def regkit_penalties(self) -> list[type[regkit.Penalty]]:
        return [Squares]

    @regkit.hookimpl
    def regkit_activity_penalties(self) -> list[type[regkit.ActivityPenalty]]:
        return [Mean]

    @regkit.hookimpl
    def regkit_constraints(self) -> list[type[regkit.Constraint]]:
        return [Ball]

    @regkit.hookimpl
    def regkit_schedules(self) -> list[type[regkit.Schedule]]:
        return [Slow]


def attached(model: nn.Module, *rules: dict[str, Any]) -> regkit.Attachment:
    return regkit.attach(model, {"rules": list(rules)}, registry=regkit.Registry([Plugin()]))


def stepping(model: nn.Module, attachment: regkit.Attachment, batches: Batches) -> Callable[[], None]:
    """A backward pass, and what steps on its gradients."""
    optimizer = SGD(model.parameters(), lr=0.1)
    optimizer.zero_grad()
    (loss_of(model, *batches[0]) + attachment.penalty()).backward()
    return lambda: optimizer.step()


RULES: dict[str, dict[str, Any]] = {
    "gradient": {"name": "mine", "penalty": "squares(0.1)"},
    "value": {"name": "mine", "penalty": "squares(0.1)", "via": "loss"},
    "prox": {"name": "mine", "penalty": "squares(0.1)", "via": "proximal"},
    "decay": {"name": "mine", "penalty": "squares(0.1)", "via": "decoupled"},
    "project": {"name": "mine", "constraint": "ball", "target": {"role": "recurrent"}},
    "factor": {"name": "mine", "penalty": "squares(0.1)", "schedule": "slow"},
    "activity": {"name": "mine", "penalty": "mean(0.1)"},
}
