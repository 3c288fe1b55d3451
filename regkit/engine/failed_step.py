"""The mark of a step that may fail: what was added to gradients is in them until backward passes make new ones."""

from __future__ import annotations

from torch import Tensor, nn

from regkit.errors import StepError
from regkit.runtime.step import Step


class FailedStep:
    """That gradients hold what a step added to them: the first of them, as it was then. gradient: None where none do.

    complete: whether all was added, or something failed before. version: the gradient's, then. trained: the parameters
    whose gradients they are.
    """

    parameter: nn.Parameter | None = None
    gradient: Tensor | None = None
    complete = renewed = False
    version = 0
    trained: frozenset[int] = frozenset()

    def passed(self) -> None:
        """A backward pass is about to reach it: it makes a new gradient if that was zeroed, and else adds to it."""
        if self.gradient is not None and self.gradient._version != self.version:
            self.renewed = True

    def holds(self, step: Step) -> bool:
        """Whether this step has these very gradients again. Raises StepError where they are no more what they were."""
        leaf, gradient = self.parameter, self.gradient
        if (
            leaf is None
            or gradient is None
            or leaf.grad is not gradient
            or self.renewed
            or id(leaf) not in step.trained
        ):
            return False
        if self.complete and gradient._version == self.version and self.trained == step.trained:
            return True
        raise StepError(
            "the last step failed, and penalties are in its gradients already, which are stepped with others now, or "
            "are not as they were then; call zero_grad(set_to_none=True) and run the backward pass again"
        )
