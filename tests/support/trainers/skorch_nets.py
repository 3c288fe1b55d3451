"""skorch nets for tests: a model, the data, and the net around them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from skorch import NeuralNet
from torch import Tensor, nn

from regkit.integrations.skorch import RegularizedLoss
from tests.support.loops import DECAY, RULE

Data = tuple[np.ndarray, np.ndarray]
BOUND = 0.4
BALL = {"name": "ball", "constraint": f"max_norm({BOUND})"}
AR = {"name": "ar", "penalty": "activity_l2(2)"}
RULES = {"rules": [{**RULE["rules"][0], "name": "l2"}, {**BALL, "every": 3}, AR]}


class Reader(nn.Module):
    """A model written without regkit in mind: the same weights whenever it is made."""

    def __init__(self, hidden: int = 4) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.rnn = nn.LSTM(3, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


class Net(RegularizedLoss, NeuralNet):
    """What a user writes to have activity penalties."""


def made(module: Any, kind: type[NeuralNet] = NeuralNet, **options: Any) -> NeuralNet:
    """A net of two epochs over four batches."""
    settings = {"criterion": nn.MSELoss, "optimizer": torch.optim.Adam, "lr": 0.05, "max_epochs": 2, "batch_size": 6}
    return kind(module, **{**settings, "train_split": None, "verbose": 0, **options})


def generated() -> Data:
    """X (batch, time, features) and y."""
    generator = np.random.default_rng(0)
    return generator.normal(size=(24, 5, 3)), generator.normal(size=(24, 5, 2))


def decayed(data: Data, **options: Any) -> NeuralNet:
    return made(Reader(), optimizer__param_groups=[("rnn.*", {"weight_decay": DECAY})], **options).fit(*data)
