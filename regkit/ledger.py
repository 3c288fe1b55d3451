"""Whether what must go through the loss did: tickets that `penalty()` hands out, and that backpropagation stamps."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


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

    def missing(self) -> str | None:
        """Why it did not go through a loss that was backpropagated; None where it did."""
        if not self.tickets:
            return "was not part of the loss in this step; add attachment.penalty() to the loss"
        if any(ticket.backpropagated for ticket in self.tickets):
            return None
        return (
            "was taken by attachment.penalty(), but was not part of the loss that was backpropagated; add what it "
            "returns to the loss (attachment.values() is for logging)"
        )
