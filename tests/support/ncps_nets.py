"""Layers of ncps in a model, and a loop that trains them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ncps.torch as ncps_torch
import torch
from ncps.wirings import AutoNCP
from torch import Tensor, nn


class Net(nn.Module):
    """A layer of ncps, and a head."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.rnn = layer
        self.head = nn.LazyLinear(1).double()
        self(torch.zeros(1, 2, 3, dtype=torch.float64))

    def outputs(self, x: Tensor) -> Tensor:
        """What the layer puts out.  x: (batch, time, 3), as is what it puts out."""
        state = torch.zeros(x.size(0), self.rnn.state_size, dtype=x.dtype)  # ncps would make one in float32
        return self.rnn(x, (state, state) if self.rnn.use_mixed else state)[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.outputs(x))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "backbone": lambda: ncps_torch.CfC(3, 4, backbone_units=5, backbone_layers=2),
    "no backbone": lambda: ncps_torch.CfC(3, 4, backbone_layers=0),
    "pure": lambda: ncps_torch.CfC(3, 4, mode="pure", backbone_units=5),
    "no gate": lambda: ncps_torch.CfC(3, 4, mode="no_gate", backbone_layers=0, proj_size=2),
    "wired": lambda: ncps_torch.CfC(3, AutoNCP(8, 2)),
    "mixed memory": lambda: ncps_torch.CfC(3, 4, backbone_units=5, mixed_memory=True),
    "LTC": lambda: ncps_torch.LTC(3, AutoNCP(8, 2)),
    "LTC explicit": lambda: ncps_torch.LTC(3, 4, implicit_param_constraints=False, mixed_memory=True),
}


def make(name: str) -> Net:
    torch.manual_seed(1)
    return Net(LAYERS[name]().double())


def sequences() -> list[Tensor]:
    """Batches, (batch, time, features)."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(4, 5, 3, generator=generator, dtype=torch.float64) for _ in range(3)]


def train(model: Net, xs: list[Tensor], extra=None, after=None, lr: float = 0.2) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    for x in xs:
        optimizer.zero_grad()
        loss = (model(x) - x.sum(-1, keepdim=True)).square().mean()
        (loss if extra is None else loss + extra(model)).backward()
        optimizer.step()
        if after is not None:
            with torch.no_grad():
                after(model)


def rule(**rule: Any) -> dict[str, Any]:
    return {"rules": [{"name": "it", **rule}]}
