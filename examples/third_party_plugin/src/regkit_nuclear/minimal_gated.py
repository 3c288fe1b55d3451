"""The minimal gated unit in plain PyTorch, and the adapter that tells regkit what it is made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from regkit import Adapter, Example, Form, Output, OutputSite, Segment, Validity, Weight, hookimpl
from regkit.activity import of_step
from torch import Tensor, nn
from torch.nn.functional import linear


class MinimalGatedCell(nn.Module):
    """A gated cell with one gate: h' = (1 − f) ⊙ h + f ⊙ n  (Zhou et al. 2016).

    f = σ(W_f x + U_f h + b_f), n = tanh(W_n x + U_n (f ⊙ h) + b_n); f is stacked above n in every weight.
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.w = nn.Parameter(torch.empty(2 * hidden_size, input_size))
        self.u = nn.Parameter(torch.empty(2 * hidden_size, hidden_size))
        self.b = nn.Parameter(torch.empty(2 * hidden_size))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(hidden_size**-0.5), hidden_size**-0.5)

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        """One step of time.  x: (batch, inputs) or (inputs,), h: (batch, hidden) or (hidden,) -> h'."""
        before = x.new_zeros(*x.shape[:-1], self.hidden_size) if h is None else h
        forget, new = linear(x, self.w, self.b).chunk(2, dim=-1)
        u_forget, u_new = self.u.chunk(2)
        f = (forget + linear(before, u_forget)).sigmoid()
        n = (new + linear(f * before, u_new)).tanh()
        return (1 - f) * before + f * n


class MinimalGatedAdapter(Adapter):
    """MinimalGatedCell, called in a loop: each call is one step of time."""

    modules: ClassVar[tuple[type[nn.Module], ...]] = (MinimalGatedCell,)
    gates: ClassVar[tuple[str, ...]] = ("forget", "new")
    steps: ClassVar[bool] = True

    def weights(self, module: nn.Module) -> Iterator[Weight]:
        for name, role in (("w", "kernel"), ("u", "recurrent"), ("b", "bias")):
            yield Weight((name,), role, gates=self.gates)

    def outputs(self, module: nn.Module) -> Sequence[Output]:
        return [Output("output", sequence=True)]

    def observe(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> Mapping[str, Any]:
        return {"output": result, "before": kwargs.get("h", args[1] if len(args) > 1 else None)}

    def starts(self, observed: Mapping[str, Any]) -> bool:
        return observed["before"] is None

    def segments(
        self,
        module: nn.Module,
        site: OutputSite,
        observed: Mapping[str, Any],
        valid: Validity | None,
        step: int,
    ) -> Sequence[Segment]:
        return [of_step(observed["output"], observed["before"], valid, step)]

    def form(self, module: nn.Module, site: OutputSite) -> Form:
        return Form("output", "before")  # what `segments` makes one segment of, so that many can be reduced at once

    def examples(self) -> Sequence[Example]:
        example = Example(
            make=lambda: MinimalGatedCell(3, 4),
            features=3,
            equations=_equations,
            state=lambda cell, batch: torch.zeros(batch, 4),
        )
        return [example]


def _equations(
    cell: nn.Module, x: Tensor, h: Tensor, layer: int, direction: str
) -> tuple[Mapping[str, Tensor], Tensor]:
    """One step as the paper writes it, gate by gate: by this the laws tell whether the adapter has them in order."""
    assert isinstance(cell, MinimalGatedCell)
    (w_f, w_n), (u_f, u_n), (b_f, b_n) = cell.w.chunk(2), cell.u.chunk(2), cell.b.chunk(2)
    f = torch.sigmoid(x @ w_f.T + h @ u_f.T + b_f)
    n = torch.tanh(x @ w_n.T + (f * h) @ u_n.T + b_n)
    return {"forget": f, "new": n}, (1 - f) * h + f * n


@hookimpl
def regkit_adapters() -> list[Adapter]:
    """The adapters that this module offers."""
    return [MinimalGatedAdapter()]
