"""Whether what must go through the loss did: tickets that `penalty()` hands out, and that backpropagation stamps."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from regkit.errors import StepError


class Ticket:
    """Handed out with each `penalty()`: learns whether its gradient was ever asked for."""

    def __init__(self) -> None:
        self.backpropagated = False

    def __call__(self, gradient: Tensor) -> None:
        self.backpropagated = True


@dataclass
class Ledger:
    """The tickets of one thing that must go through the loss, since the last step that trained it."""

    tickets: list[Ticket] = field(default_factory=list)

    def require(self, what: str) -> None:
        """Raise StepError unless it went through a loss that was backpropagated."""
        if not self.tickets:
            raise StepError(f"{what} was not part of the loss in this step; add attachment.penalty() to the loss")
        if not any(ticket.backpropagated for ticket in self.tickets):
            raise StepError(
                f"{what}: attachment.penalty() was called, but what it returned was not part of the loss that was "
                "backpropagated; add it to the loss (attachment.values() is for logging)"
            )
