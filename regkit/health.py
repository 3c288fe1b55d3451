"""Whether the weights under rules are finite, looked at now and then: a NaN is told with its name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import torch
from torch import Tensor

from regkit.blocks import Block
from regkit.errors import AttachError, StepError, listing
from regkit.modes import capturing

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

    def due(self, index: int) -> bool:
        """Whether it is time to look."""
        return index % _EVERY == 0 and index != self._looked  # several optimizers may take one step together

    def look(self, index: int) -> None:
        """Look, if it is time to. Raises StepError where a weight is not finite."""
        if not self.due(index) or capturing():
            return
        if names := self._sick():
            raise StepError(f"NaN or infinite numbers in {names} before step {index}; training has come apart")
        self._looked = index

    def _sick(self) -> str | None:
        """The names of what is not finite."""
        found = list(self._weights())
        if _surely_finite([weight for _, weight in found]):
            return None
        bad = [name for name, weight in found if not bool(weight.isfinite().all())]
        return listing(bad) if bad else None

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        for block in self._blocks:
            for name, storage in zip(block.site.parameters, block.storages(), strict=True):
                weight = storage.read().detach()
                if not weight.is_meta:
                    yield f"{block.site.name}.{name}".lstrip("."), weight


def _surely_finite(weights: Iterable[Tensor]) -> bool:
    """Whether the norms of all are, which is quick to see. Those of huge weights may not be, though the weights are."""
    alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for weight in weights:
        alike.setdefault((weight.dtype, weight.device), []).append(weight)
    fine = [
        torch.stack(torch._foreach_norm(some, dtype=torch.promote_types(dtype, torch.float32))).isfinite().all()
        for (dtype, _), some in alike.items()
    ]
    return not fine or bool(torch.stack([one.to(fine[0].device) for one in fine]).all())  # one wait for all
