"""Which parameters of ours an optimizer owns: worked out when it is first met, and when either side has changed."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping
from operator import is_
from typing import Any

from torch import nn
from torch.optim import Optimizer

Here = Mapping[int, nn.Parameter]
"""Our parameters by their ids: the very same mapping for as long as they are the same."""

Groups = Mapping[int, dict[str, Any]]
"""The parameter group of each parameter, by its id."""


class Owned:
    """What of ours is in some parameter groups.

    groups: of all parameters, whosesoever; ours: of ours, which `leaves` lists and `ids` holds.
    """

    def __init__(self, here: Here, groups: Groups) -> None:
        self.here = here
        self.ours: Groups = {key: groups[key] for key in here if key in groups}
        self.groups = self.ours if len(self.ours) == len(groups) else groups  # often all is ours
        self.leaves = [here[key] for key in self.ours]
        self.ids = frozenset(self.ours)

    def among(self, here: Here) -> Owned:
        """The same of what is here now."""
        return self if here is self.here else Owned(here, self.groups)

    def without(self, taken: Collection[int]) -> Owned:
        """The same but for the parameters of these ids."""
        return Owned({key: leaf for key, leaf in self.here.items() if key not in taken}, self.groups)


class Met:
    """An optimizer as it was, and what it owned of ours."""

    def __init__(self, optimizer: Optimizer, here: Here) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._lists = [(group, list(group["params"])) for group in optimizer.param_groups]
        self.owned = Owned(here, {id(p): group for group, parameters in self._lists for p in parameters})

    @property
    def alive(self) -> bool:
        """Whether the optimizer is there still."""
        return self._optimizer() is not None

    def is_as_ever(self, optimizer: Optimizer) -> bool:
        """Whether this is the optimizer, and has the parameters that it had, in the same groups."""
        groups = optimizer.param_groups
        if self._optimizer() is not optimizer or len(groups) != len(self._lists):
            return False
        for group, (was, parameters) in zip(groups, self._lists, strict=True):
            now = group["params"]
            if group is not was or len(now) != len(parameters) or not all(map(is_, now, parameters)):
                return False
        return True


class Ownership:
    """What each optimizer owns, as far as it has been met."""

    def __init__(self) -> None:
        self._met: weakref.WeakKeyDictionary[Optimizer, Met] = weakref.WeakKeyDictionary()

    def last(self, optimizer: Optimizer) -> Met | None:
        """The optimizer as it was when it was last met; None where it was not, or has other parameters now."""
        met = self._met.get(optimizer)
        return met if met is not None and met.is_as_ever(optimizer) else None

    def meet(self, optimizer: Optimizer, here: Here) -> Met:
        """The optimizer as it is now."""
        met = self._met[optimizer] = Met(optimizer, here)
        return met

    def release(self) -> None:
        """Know none any more."""
        self._met.clear()
