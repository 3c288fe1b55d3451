"""Steps that no torch optimizer makes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from regkit.engine.program import ActiveStep
from regkit.engine.tracker import StepTracker


@dataclass(eq=False)
class ManualStep:
    """The context of an update that no torch optimizer makes: what is before and after a step is done around it.

    lr: what proximal and decoupled rules multiply by.
    """

    hooks: StepTracker
    lr: float | Tensor | None
    step: ActiveStep | None = None

    def __enter__(self) -> None:
        self.step = self.hooks.begin_by_hand(self.lr)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        assert self.step is not None
        self.hooks.end_by_hand(self.step, failed=kind is not None)
