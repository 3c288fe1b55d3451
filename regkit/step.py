"""One optimizer step."""

from __future__ import annotations

from dataclasses import dataclass
from types import CodeType

from torch import Tensor
from torch.optim import Optimizer

from regkit.ownership import Groups, Owned


@dataclass(eq=False)
class Step:
    """One optimizer step that owns parameters of ours.

    optimizer: None for an update that is not made by a torch optimizer, inside `attachment.step()`.
    owned: its parameters of ours; groups: the parameter group of each, by its id.
    scale: the loss scale still in the gradients; a fused optimizer divides by it itself.
    index: how many steps came before it.
    trained: the ids of those that have a gradient, once gradients are complete.
    """

    optimizer: Optimizer | None
    owned: Owned
    scale: Tensor | None
    skipped: bool
    index: int
    frame: tuple[int, CodeType] | None
    trained: frozenset[int] = frozenset()
    evaluations: int = 0

    @property
    def groups(self) -> Groups:
        """The parameter group of each of its parameters."""
        return self.owned.ours

    @property
    def by(self) -> str:
        """Who makes the step, for a sentence."""
        return "attachment.step()" if self.optimizer is None else type(self.optimizer).__name__
