"""A stranger's cell, a minimal gated unit, and the adapter that its author wrote for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import regkit
from regkit.activity import Segment, of_step


class MinimalGatedCell(nn.Module):
    """A minimal gated unit (Zhou et al. 2016) in plain PyTorch, with one bias, as its author might have written it."""

    def __init__(self, inputs: int, hidden: int, gates: int = 2) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(gates * hidden, inputs))
        self.u = nn.Parameter(torch.randn(gates * hidden, hidden))
        self.b = nn.Parameter(torch.zeros(gates * hidden))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        wf, wh = (x @ self.w.T + self.b).chunk(2, -1)
        uf, uh = self.u.chunk(2)
        f = torch.sigmoid(wf + h @ uf.T)
        return (1 - f) * h + f * torch.tanh(wh + (f * h) @ uh.T)


class MinimalGatedAdapter(regkit.Adapter):
    modules: ClassVar[tuple[type[nn.Module], ...]] = (MinimalGatedCell,)
    gates: ClassVar[tuple[str, ...]] = ("forget", "new")
    roles: ClassVar[tuple[str, ...]] = ("kernel", "recurrent", "bias", "memory")
    steps: ClassVar[bool] = True

    def weights(self, module: nn.Module) -> Iterator[regkit.Weight]:
        for name, role in (("w", "kernel"), ("u", "recurrent"), ("b", "bias")):
            yield regkit.Weight((name,), role, gates=self.gates)

    def outputs(self, module: nn.Module) -> Sequence[regkit.Output]:
        return [regkit.Output("memory", sequence=True)]

    def observe(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> Mapping[str, Any]:
        return {"memory": result, "before": args[1]}

    def segments(
        self,
        module: nn.Module,
        site: regkit.OutputSite,
        observed: Mapping[str, Any],
        valid: regkit.Validity | None,
        step: int,
    ) -> Sequence[Segment]:
        return [of_step(observed["memory"], observed["before"], valid, step)]
