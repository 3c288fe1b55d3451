"""The mark of a step that may fail: what was added to gradients is in them until backward passes make new ones."""

from __future__ import annotations

from torch import Tensor, nn

from regkit.errors import StepError
from regkit.step import Step


class Mark:
    """That gradients hold what a step added to them: the first of them, as it was then.

    complete: whether all was added, or something failed before.
    """

    def __init__(self, leaf: nn.Parameter, gradient: Tensor, complete: bool) -> None:
        self._leaf, self._gradient, self._complete = leaf, gradient, complete
        self._version: int | None = None
        self._renewed = False

    def settle(self) -> None:
        """No listener touches it any more before the step. Others may have run backward passes of their own."""
        if self._version is None:
            self._version = self._gradient._version

    def passed(self) -> None:
        """A backward pass is about to reach it: it makes a new gradient if that was zeroed, and else adds to it."""
        if self._version is not None and self._gradient._version != self._version:
            self._renewed = True

    def holds(self, step: Step) -> bool:
        """Whether this step has these very gradients again. Raises StepError where they are no more what they were."""
        if id(self._leaf) not in step.trained or self._leaf.grad is not self._gradient or self._renewed:
            return False
        if self._complete and self._gradient._version == self._version:
            return True
        raise StepError(
            "the last step failed, and penalties are in its gradients already, which are not as they were then; call "
            "zero_grad(set_to_none=True) and run the backward pass again"
        )
