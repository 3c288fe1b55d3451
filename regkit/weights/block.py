"""The blocks of weights that rules act on: sites of a plan, on the live model."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor, nn

from regkit.adapters import WeightSite, oriented
from regkit.errors import AttachError
from regkit.kinds import Layout
from regkit.weights.locate import storage_of
from regkit.weights.storage import Storage


class Block:
    """A site of a plan on the live model: a whole weight, or the rows of one gate.

    Modules are held weakly, so that an attachment keeps no model alive. The storage is looked up at each use: a weight
    may be replaced (`load_state_dict(assign=True)`, `to_empty`, `fully_shard`).

    as_kept: whether the block is a whole weight as the storage has it. rows: whether it is some rows of such a weight.
    """

    __slots__ = ("_all_rows", "_layout", "_module", "_parent", "_reoriented", "as_kept", "rows", "site")

    def __init__(self, site: WeightSite, module: nn.Module, parent: nn.Module | None, layout: Layout) -> None:
        self.site = site
        self._module = weakref.ref(module)
        self._parent = None if parent is None else weakref.ref(parent)
        self._layout = layout
        self._all_rows = site.gate is None
        self._reoriented = site.transposed or site.columns is not None
        plain = not self._reoriented and layout != "cell"
        self.as_kept = plain and self._all_rows  # and so needs no view
        self.rows = plain and not self._all_rows  # and so needs only to be narrowed

    @property
    def name(self) -> str:
        """The block's name for a sentence: `encoder.rnn.weight_hh_l0 (forget)`."""
        name = f"{self.site.name}.{self.site.parameter}".lstrip(".")
        return name if self._all_rows else f"{name} ({self.site.gate})"

    def alive(self) -> nn.Module | None:
        """The module that has the weight, None where the module is gone."""
        return self._module()

    @property
    def module(self) -> nn.Module:
        """The module that has the weight. Raises AttachError where the module is gone."""
        module = self._module()
        if module is None:
            raise AttachError(f"the module {self.site.name!r} is gone")
        return module

    def storages(self, known: dict[Hashable, Storage] | None = None) -> Sequence[Storage]:
        """The present storages of the weight; two storages are two biases, of which the sum acts.

        known: the storages that have been looked up, to which the block's are added. Raises AttachError where there is
        no storage.
        """
        module, known = self.module, {} if known is None else known
        parent = None if self._parent is None else self._parent()
        acting = self.site.through, self.site.mask
        storages = []
        for name in self.site.parameters:
            key = id(module), id(parent), name, acting
            if key not in known:
                try:
                    known[key] = storage_of(module, parent, name, *acting)
                except AttachError as error:
                    raise self._named(error) from None
            storages.append(known[key])
        return tuple(storages)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The present parameters behind the weight."""
        for storage in self.storages():
            yield from storage.parameters

    def place(self, storages: Sequence[Storage]) -> tuple[Hashable, ...]:
        """A key that is equal for tied weights: for blocks that are the same numbers under several names."""
        return (*(one for storage in storages for one in storage.identity), self.site.part)

    def view(self, tensor: Tensor) -> Tensor:
        """A view of the block in a whole weight or its gradient, in the layout that the kind asked for."""
        site = self.site
        if self.as_kept and tensor.shape == site.shape:
            return tensor
        if self._reoriented:
            try:
                tensor = oriented(tensor, site.transposed, site.columns)
            except (IndexError, RuntimeError):
                raise self._other_shape(tensor) from None
        if tensor.dim() != len(site.shape) or (tensor.size(0) != site.units and not self._all_rows):
            raise self._other_shape(tensor)
        block = tensor if self._all_rows else tensor.narrow(0, site.start, site.rows)
        return torch.unflatten(block, 0, (site.gates, -1)) if self._layout == "cell" else block

    def _other_shape(self, now: Tensor) -> AttachError:
        was = self.site.units, *self.site.shape[1:]
        return AttachError(
            f"the weight of {self.name} was {was} at attach() and is {tuple(now.shape)} now; attach anew"
        )

    def weight(self, storages: Sequence[Storage]) -> Tensor:
        """The weight that acts: a view of the one weight, or the sum of two biases."""
        first = self.view(storages[0].read())
        return first if len(storages) == 1 else first + self.view(storages[1].read())

    def shares(self, owned: Sequence[Storage]) -> int | Tensor:
        """The number of storages that can be changed; a tensor of counts where numbers of the block differ in that."""
        free = [storage.free(self.view) for storage in owned]
        if all(one is None for one in free):
            return len(owned)
        first = next(one for one in free if one is not None)
        return sum((torch.ones_like(first) if one is None else one).double() for one in free)

    def reach(self, owned: Sequence[Storage]) -> int | Tensor:
        """The square of the weight's change for a change of the parameters by 1: Σ m², of parameters in m storages.

        The change of a sum Σ m·x by δ costs least, ½‖δ‖² / Σ m², where each x changes by m·δ / Σ m².
        """
        tied: dict[Hashable, list[Storage]] = {}
        for storage in owned:
            tied.setdefault(tuple(map(id, storage.parameters)), []).append(storage)
        first, *others = [self.shares(group) ** 2 for group in tied.values()]
        return sum(others, first)

    def move(self, storages: Sequence[Storage], owned: Sequence[Storage], point: Tensor) -> None:
        """Make the weight that acts equal to a point, by changing the storages in `owned`.

        For a sum a + b the change is shared equally, which is the nearest pair: ‖Δa‖² + ‖Δb‖² is least under a given
        Δa + Δb where Δa = Δb. Pruned numbers take no share. Raises AttachError where none can take any.
        """
        if len(storages) == 1:
            self.write(storages[0], point)
            return
        change, shares = point - self.weight(storages), self.shares(owned)
        if isinstance(shares, Tensor):
            if bool(((shares == 0) & (change != 0)).any()):
                raise AttachError(f"{self.name} cannot be set to a point: where it would change, all of it is pruned")
            shares = shares.clamp(min=1)
        share = change / shares
        points = [self.view(storage.read()) + share for storage in owned]  # before writing: storages may be tied
        for storage, moved in zip(owned, points, strict=True):
            self.write(storage, moved)

    def write(self, storage: Storage, point: Tensor) -> None:
        """Make the block equal to a point in one of its storages. Raises AttachError where that is impossible."""
        try:
            storage.write(self.view, point)
        except AttachError as error:
            raise self._named(error) from error

    def check_writable(self, storage: Storage, points: Sequence[Tensor]) -> None:
        """Raise AttachError where `write` could not bring the block to points like these."""
        try:
            storage.check_writable(self.view, points)
        except AttachError as error:
            raise self._named(error) from error

    def _named(self, error: AttachError) -> AttachError:
        return AttachError(f"{self.site.name or 'the model'}: {error}")
