"""A small model that was written without regkit in mind."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Tagger(nn.Module):
    """A model written without regkit in mind."""

    def __init__(self, layer: type[nn.RNNBase] = nn.LSTM, **options: object) -> None:
        super().__init__()
        self.rnn = layer(3, 4, **options)
        self.head = nn.LazyLinear(2)
        self(torch.zeros(2, 1, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


MakeModel = Callable[..., Tagger]
