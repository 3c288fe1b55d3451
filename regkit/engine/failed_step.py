"""Steps that fail: the penalties that a step has added to gradients stay there until a backward pass renews these."""

from __future__ import annotations

from torch import Tensor, nn

from regkit.errors import StepError
from regkit.runtime.step import Step


class PenalizedGradient:
    """The first gradient to which a step has added penalties, which stands for all gradients of the step.

    parameter: the parameter of that gradient.
    version: the gradient's version once penalties were added.
    trained: the ids of the parameters that the step trained.
    complete: whether all penalties were added, or something failed before.
    renewed: whether a backward pass has made the gradient anew.
    """

    parameter: nn.Parameter
    gradient: Tensor
    version: int
    trained: frozenset[int]
    complete = renewed = False


class FailedSteps:
    """The memory of steps that have added penalties and not ended, so that a retry after a failure adds none again.

    Several optimizers may have failed, or run within one another: each step has a memory of its own.

    begun: what these steps have added to; last: what the step that began last has, None where that is nothing.
    """

    def __init__(self) -> None:
        self.begun: list[PenalizedGradient] = []
        self.last: PenalizedGradient | None = None

    def release(self) -> None:
        """Hold no parameter and no gradient any more: a step that has raised may still be taken for running."""
        for one in self.begun:
            vars(one).clear()
        self.begun, self.last = [], None

    def gradients_final(self) -> None:
        """Remember the gradient as of now: others may have changed the numbers since the penalties were added."""
        if self.last is not None:
            self.last.version, self.last.renewed = self.last.gradient._version, False

    def backward_begins(self) -> None:
        """Note that a backward pass reaches gradients: a zeroed one is made anew by that, any other is added to."""
        for one in self.begun:
            if one.gradient._version != one.version:
                one.renewed = True

    def retried_by(self, step: Step) -> PenalizedGradient | None:
        """The memory of a failed step that a step takes again, so that all penalties are added; None for no such step.

        Raises StepError where they are there in a part. What was renewed since is forgotten.
        """
        self.begun = [one for one in self.begun if one.parameter.grad is one.gradient and not one.renewed]
        found = [one for one in self.begun if id(one.parameter) in step.trained]
        if not found:
            return None
        first = found[0]
        if first.complete and first.gradient._version == first.version and first.trained == step.trained:
            return first
        raise StepError(
            "the last step failed, and penalties are in its gradients already, which are stepped with others now, or "
            "are not as they were then; call zero_grad(set_to_none=True) and run the backward pass again"
        )
