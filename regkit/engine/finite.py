"""Finiteness of the weights under rules: a NaN or an infinite number is an error that names the weight."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

from regkit.errors import AttachError, StepError, listing
from regkit.runtime.modes import is_capturing
from regkit.runtime.sharding import everywhere, local, sharded
from regkit.weights.snapshot import Snapshots

EVERY: Final = 64
"""Steps between two checks. Each check reads every weight once and, on a GPU, waits for the result."""


class FiniteCheck:
    """The check that weights are finite: when rules are attached, before the first step, and before every 64th."""

    def __init__(self, snapshots: Snapshots) -> None:
        self._snapshots = snapshots
        self._last = -1
        """The step before which weights were last checked."""

    def check_finite(self) -> None:
        """Raise AttachError where a weight is not finite."""
        if names := self._not_finite_names():
            raise AttachError(f"NaN or infinite numbers in {names}: initialize or load weights before regkit.attach()")

    def look(self, index: int) -> None:
        """Check before a step, once for each. Raises StepError where a weight is not finite."""
        if index == self._last or is_capturing():  # several optimizers may take one step together
            return
        if names := self._not_finite_names():
            raise StepError(f"NaN or infinite numbers in {names} before step {index}; training has come apart")
        self._last = index

    def _not_finite_names(self) -> str | None:
        """The names of the weights that are not finite, as a phrase; None where all are finite."""
        alike: dict[Hashable, list[tuple[str, Tensor]]] = {}
        for name, weight in self._weights():
            mesh = weight.device_mesh if sharded(weight) else None
            alike.setdefault((weight.dtype, weight.device, mesh), []).append((name, weight))
        names = [name for named in alike.values() for name in _not_finite(named)]
        return listing(names) if names else None

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        """Each weight under a rule, once, with the weight's name."""
        snapshot = self._snapshots.fresh()
        blocks = {(block.site.path, block.site.parameters): block for block in snapshot.storages}
        for block in blocks.values():
            for name, storage in zip(block.site.parameters, snapshot.storages[block], strict=True):
                weight = storage.probe().detach()
                if not weight.is_meta:
                    yield f"{block.site.name}.{name}".lstrip("."), weight
        snapshot.forget()


def _not_finite(named: Sequence[tuple[str, Tensor]]) -> Iterator[str]:
    """The names of the weights that are not finite, of weights of one dtype on one device, or one mesh.

    Each process looks at its own shards, and all come to the same result: a process that raised alone would leave the
    others waiting.
    """
    first = named[0][1]
    parts = [local(weight) for _, weight in named]
    norms = torch.stack(torch._foreach_norm(parts, dtype=torch.promote_types(first.dtype, torch.float32)))
    if bool(everywhere(norms.isfinite(), first).all()):
        return
    # The norms of huge weights may be infinite, though the weights are not.
    finite = everywhere(torch.stack([part.isfinite().all() for part in parts]), first)
    yield from (name for (name, _), fine in zip(named, finite.tolist(), strict=True) if not fine)
