"""Models with rules in force, kept in `pickles`: `python -m tests.support.pickled_models` writes them anew.

The files are of format 1, made when it was new, and are there to be loaded by every later regkit: write them anew only
beside a new format, under its number. Their classes are torch's alone, and their weights come from no random numbers.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import SGD

import regkit

FOLDER: Final = Path(__file__).parent / "pickles"
STEPS: Final = 3
"""The optimizer steps that a kept model has made."""

RULES: Final[dict[str, Any]] = {
    "rules": [
        {"name": "decay", "penalty": "l2(0.2)", "schedule": "linear(0, 1, 8)", "target": {"role": "recurrent"}},
        {"name": "ball", "constraint": "max_norm(0.4)", "target": {"role": "kernel"}, "every": 2},
        {"name": "small", "penalty": "activity_l2(0.5)"},
        {"name": "smooth", "penalty": "temporal(0.5)", "optional": True},
        {"name": "bias", "target": {"role": "bias"}, "penalty": "l1(0.01)", "via": "proximal"},
    ]
}

MAKERS: Final[dict[str, Callable[[], nn.Module]]] = {
    "rnn": lambda: nn.RNN(3, 4),
    "lstm": lambda: nn.LSTM(3, 2, num_layers=2, bidirectional=True),
    "sequential": lambda: nn.Sequential(nn.Linear(3, 3), nn.GRU(3, 4)),
}


def plain(name: str) -> nn.Module:
    """A model in float64 whose weights are the same wherever it is made."""
    model = MAKERS[name]().double()
    with torch.no_grad():
        for number, weight in enumerate(model.parameters()):
            weight.copy_(torch.arange(weight.numel()).add(number).sin().mul(0.5).view_as(weight))
    return model


def train(model: nn.Module, first: int, last: int) -> None:
    """Train a model from one step up to another, with what was attached to it."""
    (attachment,) = regkit.attachments(model)
    optimizer = SGD(model.parameters(), lr=0.1)
    for step in range(first, last):
        optimizer.zero_grad()
        loss = model(batch(step))[0].sub(0.3).square().mean() + attachment.penalty()
        loss.backward()
        optimizer.step()


def batch(step: int) -> Tensor:
    """The batch of a step.  -> (5, 2, 3)"""
    return torch.arange(30, dtype=torch.float64).add(step).cos().view(5, 2, 3)


def trained(name: str, steps: int = STEPS) -> nn.Module:
    """A model with rules that has made steps."""
    model = plain(name)
    regkit.attach(model, RULES)
    train(model, 0, steps)
    return model


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in MAKERS:
        model = trained(name)
        (FOLDER / f"{name}_1.pkl").write_bytes(pickle.dumps(model, protocol=4))
        torch.save(model, FOLDER / f"{name}_1.pt", pickle_protocol=4)
