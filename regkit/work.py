"""What is to be done at a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from regkit.ownership import Here, Met
from regkit.routine import Routine
from regkit.step import Step


class Work(Protocol):
    """What is to be done at a step."""

    def hold(self) -> nn.Module | None:
        """The model, to keep it alive for a moment; None where it is gone."""

    def moved(self) -> str | None:
        """The name of a bound module that is not where it was bound any more, if there is one."""

    def here(self) -> Here:
        """Every parameter that makes a step ours, as the model has them now, by its id."""

    def unchanged(self, here: Here) -> bool:
        """Whether `here` would give these."""

    def as_ever(self, here: Here) -> bool:
        """Whether `here` last gave these, and a sample of them is the same still."""

    def met(self, optimizer: Optimizer, groups: Mapping[int, Any], acts: bool) -> None:
        """An optimizer of these parameters is about to step; whether it is one that the attachment acts with."""

    def at_gradients(self, step: Step) -> None:
        """Gradients are complete, weights not yet updated. Comes once for each evaluation of a closure."""

    def routine(self, step: Step, met: Met) -> Routine | None:
        """What was done at the gradients of a step, if the same may be done at the next; None where it may not."""

    def repeat(self, step: Step, routine: Routine, found: list[Tensor]) -> bool:
        """Do that to the gradients that were found. False where this step needs more."""

    def settled(self) -> None:
        """Nothing more is done to the gradients before the step."""

    def value(self, step: Step) -> Tensor:
        """The value of what at_gradients added to the gradients: a line search needs it."""

    def after(self, step: Step) -> None:
        """Weights are updated."""
