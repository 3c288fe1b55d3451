"""A step like the one before it: told by identity alone, and taken without looking anything up.

Between two steps the forward and backward passes drive Python's own code and objects out of the processor's caches, and
a function that takes 0.1 µs in a loop of its own takes 1 to 2 µs in training. So the usual step (one optimizer, every
gradient there, penalties through list forms) runs through as few functions as can be.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat
from operator import attrgetter, is_

from torch import Tensor, nn
from torch.optim import Optimizer

from regkit.census import Census
from regkit.ownership import Met
from regkit.weights import PenaltyRule, Repeated

Jobs = list[tuple[PenaltyRule, Repeated]]
"""Rules, and all that each acts on."""


class Routine:
    """What was done to the gradients at a step, for the next one of the same optimizer.

    changed: the number, among what the optimizer owns of ours, of the first gradient that is added to; None: there is
    none.
    """

    def __init__(self, met: Met, census: Census, jobs: Jobs, changed: Iterable[nn.Parameter]) -> None:
        self.met, self.jobs = met, jobs
        leaves = met.owned.leaves
        numbers = {id(leaf): number for number, leaf in enumerate(leaves)}
        self.changed = next((numbers[id(leaf)] for leaf in changed if id(leaf) in numbers), None)
        self._census, self._version = census, census.version
        self._dtypes, self._devices = list(map(_dtype, leaves)), list(map(Tensor.get_device, leaves))

    def is_of(self, met: Met) -> bool:
        """Whether it is of this optimizer as it is, and of what is known of the model."""
        return self.met is met and self._census.version == self._version

    def gradients(self, optimizer: Optimizer) -> list[Tensor] | None:
        """Those of what it owns of ours; None unless all is as it was, each is there, and none to be unscaled or turned
        around.
        """
        if getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None:
            return None
        for group in optimizer.param_groups:
            if group.get("maximize"):
                return None
        if not self.met.is_as_ever(optimizer):
            return None
        self._census.look()
        if self._census.version != self._version:
            return None
        leaves = self.met.owned.leaves
        found = list(map(_grad, leaves))
        if any(map(is_, found, repeat(None))) or not all(map(_requires_grad, leaves)):
            return None
        if list(map(_dtype, leaves)) != self._dtypes or list(map(Tensor.get_device, leaves)) != self._devices:
            return None
        return found


_grad, _requires_grad, _dtype = attrgetter("grad"), attrgetter("requires_grad"), attrgetter("dtype")
