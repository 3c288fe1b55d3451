"""The model at a moment: which parameters it has, and where every block of a rule is kept in them.

A snapshot is valid until one comparison of identities fails. Whatever can be known once for a model that does not
change (batches, programs of optimizers) is a field of the snapshot, and is gone with it: nothing else is to be
invalidated, or released.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from itertools import chain, repeat
from operator import attrgetter, is_
from typing import Any, Final

import torch
from torch import Tensor, nn

from regkit.errors import AttachError
from regkit.runtime.sharding import marked, sharded
from regkit.weights.batch import Placed
from regkit.weights.block import Block
from regkit.weights.links import Link, Parameters
from regkit.weights.storage import Storage

_own, _children, _buffers = map(attrgetter, ("_parameters", "_modules", "_buffers"))
_dtype, _requires_grad, _placements = map(attrgetter, ("dtype", "requires_grad", "placements"))
_alive: Final[Callable[[Any], Any]] = weakref.ref.__call__
_FSDP1: Final = "torch.distributed.fsdp._flat_param"
_group: Final[Any] = getattr(torch.distributed, "group", None)  # there wherever FSDP1 is


def _looked_up(
    bound: Iterable[tuple[str, Sequence[Block]]],
) -> tuple[dict[Block, Sequence[Storage]], Collection[Storage]]:
    """Where each block is kept, and all storages. Raises AttachError, which names a rule, where one is nowhere."""
    known: dict[Hashable, Storage] = {}
    found: dict[Block, Sequence[Storage]] = {}
    for label, blocks in bound:
        try:
            for block in blocks:
                found[block] = block.storages(known)
        except AttachError as error:
            raise AttachError(f"{label}: {error}") from error
    return found, known.values()


class Snapshot:
    """A model as it was when the snapshot was taken.

    parameters: those that make a step the attachment's, by id. storages: where each block is kept. placed: what each
    rule has made of that. programs: of optimizers, by their ids. cached: the storages that may remember a weight.
    """

    def __init__(self, source: Snapshots) -> None:
        self.storages, found = _looked_up(source.bound)
        self.cached = [one for one in found if one.remembers]
        self._constants = [mask for one in found for mask in one.constants]
        self._steady = all(one.steady for one in found)
        followed = {id(one()): one for storage in found for one in storage.follows}
        self._remember_modules(source.modules, list(followed.values()), source.links)
        leaves = {id(p): p for one in found for p in one.parameters}
        self._ruled = list(leaves.values())
        self._types, self._dtypes = list(map(type, self._ruled)), list(map(_dtype, self._ruled))
        self._devices = list(map(Tensor.get_device, self._ruled))
        self._sharded = list(filter(sharded, self._ruled))
        self._placements = list(map(_placements, self._sharded))
        leaves.update((id(p), p) for p in source.everything)
        self.parameters = leaves
        self.placed: dict[Hashable, Placed] = {}
        self.programs: dict[int, Any] = {}  # each a Program, of a room above

    def _remember_modules(
        self, bound: Sequence[weakref.ref[nn.Module]], followed: Sequence[weakref.ref[nn.Module]], links: Iterable[Link]
    ) -> None:
        """Take down what is to be compared.

        bound: of these, the parameters; followed: of these, the buffers and children, too. links: between others.
        """
        self._modules = list({id(module): one for one in (*bound, *followed) if (module := one()) is not None}.values())
        self._followed = followed
        tables = [*map(_own, map(_alive, self._modules)), *map(_buffers, map(_alive, followed))]
        self._sizes = list(map(len, tables))
        self._names = list(chain.from_iterable(tables))
        self._values = list(chain.from_iterable(map(dict.values, tables)))
        self._child_counts = list(map(len, map(_children, map(_alive, followed))))
        within = [
            Link(module, name, name)
            for module in map(_alive, followed)
            for name, child in module._modules.items()
            if child is not None
        ]
        links = [*links, *within]
        self._parents = [link._parent for link in links]
        self._links = [link._module for link in links]
        self._leaves = [link._leaf for link in links]

    def holds(self) -> bool:
        """Whether the model is what it was. Everything is compared in C: 4,000 parameters take some 150 µs.

        Not a comparison of lists: `==` of two tensors with one number is true where they are equal.
        """
        try:
            children = list(map(_alive, self._links))
            now = list(map(_own, map(_alive, self._modules)))
            if self._followed:
                now += map(_buffers, map(_alive, self._followed))
            return (
                self._steady
                and list(map(len, now)) == self._sizes
                and all(map(is_, chain.from_iterable(map(dict.values, now)), self._values))
                and list(chain.from_iterable(now)) == self._names
                and all(map(is_, map(dict.get, map(_children, map(_alive, self._parents)), self._leaves), children))
                and not any(map(is_, children, repeat(None)))
                and list(map(len, map(_children, map(_alive, self._followed)))) == self._child_counts
                and list(map(type, self._ruled)) == self._types
                and list(map(_dtype, self._ruled)) == self._dtypes
                and list(map(Tensor.get_device, self._ruled)) == self._devices
                and list(map(_placements, self._sharded)) == self._placements
                and not any(map(_requires_grad, self._constants))
                and not (_FSDP1 in sys.modules and _group.WORLD is not None and any(map(marked, self._ruled)))
            )
        except AttributeError:  # a module is gone
            return False

    def forget(self) -> None:
        """Have weights that are computed, or gathered, made anew at the next reading."""
        for one in self.cached:
            one.forget()

    def written(self, leaves: Collection[int], by: Collection[Storage]) -> None:
        """Have weights made anew of which the parameters of these ids have a part, as they were written.

        by: the storages that have written; what these have gathered is as it is now. What is computed may go by more
        than its leaves, and two may go by the same.
        """
        for one in self.cached:
            if one.computed or (one not in by and any(id(leaf) in leaves for leaf in one.parameters)):
                one.forget()


class Snapshots:
    """Takes snapshots of a model, of which the last one is kept.

    bound: the label and the blocks of each rule on weights; modules: those whose parameters make a step the
    attachment's; links: down to all modules that rules are bound to; everything: all of the model's parameters, where
    activity rules need them.
    """

    def __init__(
        self,
        bound: Sequence[tuple[str, Sequence[Block]]],
        modules: Iterable[nn.Module],
        links: Sequence[Link],
        everything: Parameters | tuple[()],
    ) -> None:
        self.bound, self.links, self.everything = bound, links, everything
        self.modules = [weakref.ref(module) for module in {id(one): one for one in modules}.values()]
        self.last: Snapshot | None = None

    def now(self) -> Snapshot:
        """The model as it is. Raises AttachError where a weight is in no place that can be followed."""
        last = self.last
        if last is None or not last.holds():
            last = self.last = Snapshot(self)
        return last

    def fresh(self) -> Snapshot:
        """The model as it is, with nothing remembered of weights that are computed or gathered."""
        snapshot = self.now()
        snapshot.forget()
        return snapshot

    def release(self) -> None:
        """Hold no parameter any more."""
        self.last = None
