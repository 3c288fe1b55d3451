"""Whether the weights under rules are finite, looked at now and then: a NaN is told with its name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import torch
from torch import Tensor

from regkit.blocks import Block
from regkit.errors import StepError

_EVERY: Final = 64
"""Steps between two looks, of which each reads every weight once."""


class Health:
    """Looks at weights every 64th step. On a GPU the answer is fetched at the next look, so that no step waits."""

    def __init__(self, blocks: Iterable[Block]) -> None:
        self._blocks = tuple({(block.site.path, block.site.parameters): block for block in blocks}.values())
        self._asked: tuple[int, Tensor] | None = None

    def look(self, index: int) -> None:
        """Look, if it is time to. Raises StepError where a weight was not finite at this look, or at the last one."""
        if not self._blocks or index % _EVERY:
            return
        self._tell()
        sums = torch.stack([one.to(self._device) for one in self._sums()])
        self._asked = (index, sums.to("cpu", non_blocking=True))
        if sums.device.type == "cpu":
            self._tell()

    @property
    def _device(self) -> torch.device:
        return next(self._blocks[0].leaves()).device

    def _sums(self) -> Iterator[Tensor]:
        for block in self._blocks:
            for storage in block.storages():
                yield storage.read().detach().sum(dtype=torch.float32)

    def _tell(self) -> None:
        if self._asked is None:
            return
        index, sums = self._asked
        self._asked = None
        if bool(sums.isfinite().all()):
            return
        names = [f"{b.site.name}.{name}".lstrip(".") for b in self._blocks for name in b.site.parameters]
        bad = [name for name, fine in zip(names, sums.isfinite().tolist(), strict=True) if not fine]
        raise StepError(f"NaN or infinite numbers in {', '.join(bad[:8])} before step {index}; training has come apart")
