"""The model at a moment: the parameters, and the storages of every block of a rule.

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

from torch import Tensor, nn

from regkit.errors import AttachError
from regkit.runtime.sharding import FLAT_PARAM, flattened, group, sharded
from regkit.weights.batch import Placed
from regkit.weights.block import Block
from regkit.weights.links import Link, Parameters
from regkit.weights.storage import Storage

_own, _children, _buffers = map(attrgetter, ("_parameters", "_modules", "_buffers"))
_dtype, _requires_grad, _placements = map(attrgetter, ("dtype", "requires_grad", "placements"))
_alive: Final[Callable[[Any], Any]] = weakref.ref.__call__


def _looked_up(
    bound: Iterable[tuple[str, Sequence[Block]]],
) -> tuple[dict[Block, Sequence[Storage]], Collection[Storage]]:
    """The storages of each block, and all storages. Raises AttachError, which names a rule, where there are none."""
    known: dict[Hashable, Storage] = {}
    storages: dict[Block, Sequence[Storage]] = {}
    for label, blocks in bound:
        try:
            for block in blocks:
                storages[block] = block.storages(known)
        except AttachError as error:
            raise AttachError(f"{label}: {error}") from error
    return storages, known.values()


class Snapshot:
    """The state of a model when the snapshot was taken.

    parameters: the model's regularized parameters, by id.
    storages: the storages of each block.
    placed: the batches that each rule has made of its blocks.
    programs: the programs of optimizers, by the optimizers' ids.
    cached: the storages that may remember a weight.
    """

    def __init__(self, source: Snapshots) -> None:
        self.storages, found = _looked_up(source.bound)
        self.cached = [one for one in found if one.remembers]
        self._constants = [mask for one in found for mask in one.constants]
        self._steady = all(one.steady for one in found)
        followed = {id(one()): one for storage in found for one in storage.follows}
        self._remember_modules(source.modules, list(followed.values()), source.links)
        parameters = {id(p): p for one in found for p in one.parameters}
        self._tracked = list(parameters.values())
        self._types, self._dtypes = list(map(type, self._tracked)), list(map(_dtype, self._tracked))
        self._devices = list(map(Tensor.get_device, self._tracked))
        self._sharded = list(filter(sharded, self._tracked))
        self._placements = list(map(_placements, self._sharded))
        parameters.update((id(p), p) for p in source.everything)
        self.parameters = parameters
        self.placed: dict[Hashable, Placed] = {}
        self.programs: dict[int, Any] = {}  # each a Program, of a room above

    def _remember_modules(
        self, bound: Sequence[weakref.ref[nn.Module]], followed: Sequence[weakref.ref[nn.Module]], links: Iterable[Link]
    ) -> None:
        """Remember the state of modules, which `holds` compares.

        bound: modules of which the parameters are compared.
        followed: modules of which the buffers and children are compared, too.
        links: further links.
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
        """Whether the model is unchanged. Everything is compared in C: 4,000 parameters take some 150 µs.

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
                and list(map(type, self._tracked)) == self._types
                and list(map(_dtype, self._tracked)) == self._dtypes
                and list(map(Tensor.get_device, self._tracked)) == self._devices
                and list(map(_placements, self._sharded)) == self._placements
                and not any(map(_requires_grad, self._constants))
                and not (FLAT_PARAM in sys.modules and group.WORLD is not None and any(map(flattened, self._tracked)))
            )
        except AttributeError:  # a module is gone
            return False

    def forget(self) -> None:
        """Forget computed and gathered weights, so that the next reading is a fresh one."""
        for one in self.cached:
            one.forget()

    def written(self, ids: Collection[int], by: Collection[Storage]) -> None:
        """Forget remembered weights that depend on parameters which have been written.

        ids: the ids of the written parameters.
        by: the storages that have written; their gathered weights are up to date. All computed weights are forgotten:
        such a weight may depend on more than its `parameters`, and several may depend on one parameter.
        """
        for one in self.cached:
            if one.computed or (one not in by and any(id(parameter) in ids for parameter in one.parameters)):
                one.forget()


class Snapshots:
    """The taker of a model's snapshots, of which the last one is kept.

    bound: the label and the blocks of each rule on weights.
    modules: the modules that have regularized parameters.
    links: the links down to all modules that rules are bound to.
    everything: all parameters of the model, where activity rules need them.
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
        """The present snapshot. Raises AttachError where a weight has no storage that can be followed."""
        last = self.last
        if last is None or not last.holds():
            last = self.last = Snapshot(self)
        return last

    def fresh(self) -> Snapshot:
        """The present snapshot, in which no computed or gathered weight is remembered."""
        snapshot = self.now()
        snapshot.forget()
        return snapshot

    def release(self) -> None:
        """Drop the last snapshot with its references to parameters."""
        self.last = None
