"""Models and documents of any size."""

from __future__ import annotations

from typing import Any

from torch import nn

Document = dict[str, Any]


def cells(number: int, size: int = 4) -> nn.ModuleDict:
    return nn.ModuleDict({"cells": nn.ModuleList(nn.GRUCell(size, size) for _ in range(number))})


def rules(*targets: Document, **rest: Any) -> Document:
    return {"rules": [{"target": target, **(rest or {"penalty": "l2(0.1)"})} for target in targets]}


REALISTIC = {
    "rules": [
        {"target": {"role": "kernel"}, "penalty": "l2(1e-4)"},
        {"target": {"role": "recurrent"}, "penalty": "l2(1e-5)"},
        {"target": {"role": ["kernel", "recurrent"]}, "constraint": "max_norm(3)"},
        {"penalty": "activity_l2(1)"},
    ]
}
