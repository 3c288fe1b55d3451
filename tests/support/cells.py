"""A model with a cell in a loop, and what its activity penalties are by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

AR_TAR = {
    "rules": [
        {"name": "ar", "penalty": {"kind": "activity_l2", "strength": 2.0}},
        {"name": "tar", "penalty": {"kind": "temporal", "strength": 1.0}},
    ]
}


def ar_tar(h: Tensor) -> Tensor:
    """By hand, for h: (time, batch, features)."""
    return 2.0 * h.square().mean() + (h[1:] - h[:-1]).square().mean()


class Looped(nn.Module):
    """A cell, called once for each step of time, and a head."""

    def __init__(self, cell: type[nn.RNNCellBase] = nn.GRUCell) -> None:
        super().__init__()
        self.rnn = cell(3, 4)
        self.head = nn.Linear(4, 2)

    def outputs(self, x: Tensor) -> Tensor:
        """What the cell puts out.  x: (time, batch, 3) -> (time, batch, 4)."""
        state, outputs = None, []
        for step in x:
            state = self.rnn(step, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.outputs(x))


class Sequenced(nn.Module):
    """A recurrent layer, and a head."""

    def __init__(self, layer: type[nn.RNNBase] = nn.LSTM, **options: object) -> None:
        super().__init__()
        self.rnn = layer(3, 4, **options)
        self.head = nn.Linear(4, 2)

    def outputs(self, x: Tensor) -> Tensor:
        """What the layer puts out.  x: (time, batch, 3) -> (time, batch, 4)."""
        return self.rnn(x)[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.outputs(x))


def make(model: type[nn.Module], *args: object, **options: object) -> nn.Module:
    """Equal models in float64 at every call."""
    torch.manual_seed(1)
    return model(*args, **options).double()
