"""Whether the weights under rules are finite, looked at now and then: a NaN is told with its name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import torch
from torch import Tensor

from regkit.blocks import Block
from regkit.errors import AttachError, StepError, listing

_EVERY: Final = 64
"""Steps between two looks. Each reads every weight once and, on a GPU, waits for it."""


class Health:
    """Looks at weights when rules are attached, before the first step, and before every 64th."""

    def __init__(self, blocks: Iterable[Block]) -> None:
        self._blocks = tuple({(block.site.path, block.site.parameters): block for block in blocks}.values())
        self._looked = -1

    def prove(self) -> None:
        """Raise AttachError where a weight is not finite."""
        if names := self._sick():
            raise AttachError(f"NaN or infinite numbers in {names}: initialize or load weights before regkit.attach()")

    def look(self, index: int) -> None:
        """Look, if it is time to. Raises StepError where a weight is not finite."""
        if index % _EVERY or index == self._looked:  # several optimizers may take one step together
            return
        if names := self._sick():
            raise StepError(f"NaN or infinite numbers in {names} before step {index}; training has come apart")
        self._looked = index

    def _sick(self) -> str | None:
        """The names of what is not finite."""
        found = list(self._finite())
        if not found:
            return None
        names, finite = zip(*found, strict=True)
        fine = torch.stack([one.to(finite[0].device) for one in finite]).tolist()  # one wait for all
        bad = [name for name, well in zip(names, fine, strict=True) if not well]
        return listing(bad) if bad else None

    def _finite(self) -> Iterator[tuple[str, Tensor]]:
        for block in self._blocks:
            for name, storage in zip(block.site.parameters, block.storages(), strict=True):
                weight = storage.read().detach()
                if not weight.is_meta:
                    yield f"{block.site.name}.{name}".lstrip("."), weight.isfinite().all()
