"""A step like the one before it: told by identity alone, and taken without looking anything up.

Between two steps the forward and backward passes drive Python's own code and objects out of the processor's caches, and
a function that takes 0.1 µs in a loop of its own takes 1 to 2 µs in training. So the usual step (one optimizer, every
gradient there, penalties through list forms) runs through as few functions as can be.
"""

from __future__ import annotations

from torch.optim import Optimizer

from regkit.batches import Batch
from regkit.census import Census
from regkit.ownership import Met
from regkit.weights import PenaltyRule

Jobs = list[tuple[PenaltyRule, list[Batch]]]
"""Rules, and all that each acts on."""


class Routine:
    """What was done to the gradients at a step, for the next one of the same optimizer."""

    def __init__(self, met: Met, census: Census, jobs: Jobs) -> None:
        self.met, self.jobs = met, jobs
        self._census, self._version = census, census.version
        self._dtypes = [leaf.dtype for leaf in met.owned.leaves]
        self._devices = [leaf.get_device() for leaf in met.owned.leaves]

    def is_of(self, met: Met) -> bool:
        """Whether it is of this optimizer as it is, and of what is known of the model."""
        return self.met is met and self._census.version == self._version

    def fits(self, optimizer: Optimizer) -> bool:
        """Whether all is as it was, each gradient there, and none of them to be unscaled or turned around."""
        if getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None:
            return False
        for group in optimizer.param_groups:
            if group.get("maximize"):
                return False
        if not self.met.is_as_ever(optimizer):
            return False
        self._census.look()
        if self._census.version != self._version:
            return False
        for leaf, dtype, device in zip(self.met.owned.leaves, self._dtypes, self._devices, strict=True):
            if leaf.grad is None or not leaf.requires_grad or leaf.dtype is not dtype or leaf.get_device() != device:
                return False
        return True
