"""Steps that fail: the penalties that a step has added to gradients stay there until a backward pass renews these."""

from __future__ import annotations

from torch import Tensor, nn

from regkit.errors import StepError
from regkit.runtime.step import Step


class FailedStep:
    """The memory that a step has added penalties to gradients, so that a retry after a failure adds none twice.

    The first gradient that was added to stands for all.

    parameter: the parameter of that gradient.
    gradient: the gradient; None where no gradient holds penalties.
    complete: whether all penalties were added, or something failed before.
    renewed: whether a backward pass has made the gradient anew.
    version: the gradient's version once penalties were added.
    trained: the ids of the parameters that the step trained.
    """

    parameter: nn.Parameter | None = None
    gradient: Tensor | None = None
    complete = renewed = False
    version = 0
    trained: frozenset[int] = frozenset()

    def gradients_final(self) -> None:
        """Remember the gradient as of now: others may have changed the numbers since the penalties were added."""
        if self.gradient is not None:
            self.version, self.renewed = self.gradient._version, False

    def backward_begins(self) -> None:
        """Note that a backward pass reaches the gradient: a zeroed one is made anew by that, any other is added to."""
        if self.gradient is not None and self.gradient._version != self.version:
            self.renewed = True

    def is_retried_by(self, step: Step) -> bool:
        """Whether a step finds its penalties in the gradients already. Raises StepError where that holds for a part."""
        parameter, gradient = self.parameter, self.gradient
        if (
            parameter is None
            or gradient is None
            or parameter.grad is not gradient
            or self.renewed
            or id(parameter) not in step.trained
        ):
            return False
        if self.complete and gradient._version == self.version and self.trained == step.trained:
            return True
        raise StepError(
            "the last step failed, and penalties are in its gradients already, which are stepped with others now, or "
            "are not as they were then; call zero_grad(set_to_none=True) and run the backward pass again"
        )
