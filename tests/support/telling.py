"""A small net, rules in short, and the one sentence that is told of a document that is wrong."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import regkit


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 4)
        self.encoder = nn.Sequential(nn.LSTM(3, 4))
        self.head = nn.Linear(4, 1)


def told(document: Any, model: nn.Module | None = None) -> str:
    """The one problem of a document, read alone or for a model."""
    with pytest.raises((regkit.SpecError, regkit.ResolveError)) as caught:
        regkit.load(document) if model is None else regkit.resolve(model, document)
    (problem,) = caught.value.problems
    return problem.message


def rule(**rule: Any) -> dict[str, Any]:
    return {"rules": [rule]}


def on(**target: Any) -> dict[str, Any]:
    return rule(penalty="l2(1)", target=target)
