"""The first step of an attachment, at which all is worked out that later steps repeat: how it grows with the rules."""

from __future__ import annotations

import gc
import time
from typing import Any

import torch
from torch import nn

import regkit


def measure_first_step(tiny: bool) -> dict[str, float]:
    """Seconds by the number of rules, each a kind of its own on a weight of its own: the least of three."""
    counts = (20, 40) if tiny else (1000, 2000, 4000)
    return {str(count): min(_first_step(count) for _ in range(3)) for count in counts}


def _first_step(count: int) -> float:
    """Of `count` rules, half of them penalties and half constraints, without the garbage collector."""
    model = nn.ModuleList([nn.GRUCell(4, 4) for _ in range(count // 4)])
    rules: list[dict[str, Any]] = []
    for number in range(count // 2):
        target = {"module": str(number // 2), "role": ("kernel", "recurrent")[number % 2]}
        rules.append({"target": target, "penalty": f"l2({0.001 * (number + 1)})"})
        rules.append({"target": target, "constraint": f"max_norm({1 + 0.001 * number})"})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with regkit.attach(model, {"rules": rules}):
        gc.collect()
        gc.disable()
        try:
            start = time.process_time()
            optimizer.step()
            return time.process_time() - start
        finally:
            gc.enable()
