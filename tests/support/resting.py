"""Steps that move nothing, after which the gradients are those of the rules, and a parametrization to see them by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

import regkit

L2 = {"rules": [{"target": {"role": "recurrent"}, "penalty": "l2(0.5)"}]}
"""Its gradient is the weight that acts, pulled back to the parameter behind it."""


class Times(nn.Module):
    """A parametrization: the weight times a number."""

    def __init__(self, by: float | nn.Parameter) -> None:
        super().__init__()
        self.by = by

    def forward(self, w: Tensor) -> Tensor:
        return self.by * w

    def right_inverse(self, w: Tensor) -> Tensor:
        return w / self.by


def step(model: nn.Module, optimizer: Optimizer) -> None:
    """A step that moves nothing, after which the gradients are those of the rules."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()


def begun(model: nn.Module, document: Any = L2, **options: Any) -> Optimizer:
    """The optimizer of a model under rules, after its first step."""
    regkit.attach(model, document, **options)
    optimizer = SGD(model.parameters(), lr=0.0)
    step(model, optimizer)
    return optimizer
