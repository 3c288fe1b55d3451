"""A whole LSTM step with L2, max-norm and activity L2: in Keras 3 on torch, and in torch with regkit.

Both train on the same batch with Adam and the mean square of the output; Keras by the loop of its guide to custom
training in PyTorch.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

import regkit
from tests.benchmarks.timing import in_turns, now, quartiles

os.environ["KERAS_BACKEND"] = "torch"
os.environ["KERAS_TORCH_DEVICE"] = "cpu"

import keras  # it reads its backend once, as it is imported

_SMALL, _NORM = 1e-6, 3.0
_RULES = [
    {"penalty": {"kind": "l2", "strength": _SMALL}},
    {"constraint": {"kind": "max_norm", "max_value": _NORM}},
    {"penalty": {"kind": "activity_l2", "strength": _SMALL, "reduction": "batch"}},
]


def _keras(x: torch.Tensor, units: int, regularized: bool) -> Callable[[], float]:
    l2, ball = keras.regularizers.L2(_SMALL), keras.constraints.MaxNorm(_NORM, axis=0)
    options: dict[str, Any] = {
        "kernel_regularizer": l2, "recurrent_regularizer": l2, "bias_regularizer": l2, "activity_regularizer": l2,
        "kernel_constraint": ball, "recurrent_constraint": ball,
    }  # fmt: skip
    layer = keras.layers.LSTM(units, return_sequences=True, **(options if regularized else {}))
    model = keras.Sequential([layer])
    model.build(tuple(x.shape))
    optimizer = keras.optimizers.Adam(_SMALL)
    optimizer.build(model.trainable_variables)

    def step() -> float:
        start = now()
        loss = model(x, training=True).square().mean()
        for extra in model.losses:
            loss = loss + extra
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            optimizer.apply([one.value.grad for one in model.trainable_variables], model.trainable_variables)
        return (now() - start) * 1e-9

    return step


def _torch(x: torch.Tensor, units: int, regularized: bool) -> Callable[[], float]:
    model = nn.LSTM(x.size(2), units, batch_first=True)
    attachment = regkit.attach(model, {"rules": _RULES}) if regularized else None
    optimizer = torch.optim.Adam(model.parameters(), lr=_SMALL)

    def step() -> float:
        start = now()
        loss = model(x)[0].square().mean()
        if attachment is not None:
            loss = loss + attachment.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return (now() - start) * 1e-9

    return step


def _block(step: Callable[[], float], steps: int) -> float:
    """The mean of consecutive steps after one that is not counted."""
    step()
    return sum(step() for _ in range(steps)) / steps


def measure_keras(tiny: bool, seconds: float, fewest: int) -> dict[str, Any]:
    """Seconds of each whole step, and how many times as long as regkit's the regularized one of Keras takes."""
    batch, time, inputs, units = (2, 3, 4, 8) if tiny else (32, 32, 64, 128)
    torch.manual_seed(0)
    x = torch.randn(batch, time, inputs)
    steps = {
        "Keras, bare": _keras(x, units, False),
        "Keras, regularized": _keras(x, units, True),
        "torch, bare": _torch(x, units, False),
        "torch, regularized by regkit": _torch(x, units, True),
    }
    for step in steps.values():
        step()
    turns = {name: partial(_block, step, 2 if tiny else 16) for name, step in steps.items()}
    samples = in_turns(turns, seconds, fewest)
    pairs = zip(samples["Keras, regularized"], samples["torch, regularized by regkit"], strict=True)
    return {
        "title": f"LSTM {inputs} to {units}, batch {batch}, time {time}",
        "steps": {name: quartiles(found) for name, found in samples.items()},
        "times": quartiles([theirs / ours for theirs, ours in pairs]),
    }
