"""Whether modules have the parameters that they had: asked once a step, for all rules together."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from operator import is_

from torch import nn

from regkit.modules import Link
from regkit.shards import flattening, marked

Entry = tuple["weakref.ref[nn.Module]", dict[str, nn.Parameter | None], list[str], list[nn.Parameter | None]]
"""A module; its own dict of parameters; what was in it."""


class Census:
    """The parameters of some modules, as they were when last looked at; and the links down to modules.

    version: counts how often they were others than before, or a link was broken. What is derived from them lasts while
    it stays.
    """

    def __init__(self, modules: Iterable[nn.Module], links: Sequence[Link]) -> None:
        self._links = links
        self._modules = [weakref.ref(module) for module in {id(one): one for one in modules}.values()]
        self._entries: list[Entry] = []
        self.version = 0

    def look(self) -> None:
        """See whether anything is another now."""
        same = bool(self._entries)
        for link in self._links:
            same = same and link.intact()
        if not same or not _same(self._entries) or (flattening() and _flattened(self._entries)):
            self._entries = list(self._taken())
            self.version += 1

    def first_is_the_same(self) -> bool:
        """Whether the first module has what it had: a sample, since what replaces parameters seldom replaces one."""
        return bool(self._entries) and _same(self._entries[:1])

    def release(self) -> None:
        """Hold no parameter any more."""
        self._entries = []
        self.version += 1

    def _taken(self) -> Iterator[Entry]:
        for reference in self._modules:
            module = reference()
            if module is not None:
                own = module._parameters
                yield reference, own, list(own), list(own.values())


def _same(entries: Iterable[Entry]) -> bool:
    for reference, own, names, parameters in entries:
        module = reference()
        # The names too: pruning gives the same parameter another one. `==` of two tensors would be a tensor.
        if module is None or module._parameters is not own or list(own) != names:
            return False
        if not all(map(is_, own.values(), parameters)):
            return False
    return True


def _flattened(entries: Iterable[Entry]) -> bool:
    """Whether FSDP1 has marked a parameter, which then stays the object that it was."""
    return any(marked(p) for *_, parameters in entries for p in parameters if p is not None)
