"""What every composition of optimizers is held to: L2 equals torch's weight_decay, and max-norm holds after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import regkit
from tests.support.loops import DECAY, RULE, assert_equal_weights

BOUND = 0.4
L2_AND_BALL = {"rules": [*RULE["rules"], {"name": "ball", "constraint": f"max_norm({BOUND})"}]}
Train = Callable[[nn.Module, float], Any]


def largest_row(model: nn.Module) -> float:
    """The largest norm of a row of the recurrent module's matrices."""
    return max(float(p.detach().norm(dim=1).max()) for p in model.rnn.parameters() if p.dim() == 2)


def assert_equals_weight_decay(
    make_model: Callable[[], nn.Module], train_with: Train, *, spec: dict[str, Any] = RULE, tolerance: float = 1e-9
) -> regkit.Attachment:
    """train_with(model, decay) makes the optimizers, with this decay on `model.rnn`, and trains."""
    bare, decayed, regularized, bounded = (make_model() for _ in range(4))
    train_with(bare, 0.0)
    train_with(decayed, DECAY)
    attachment = regkit.attach(regularized, spec)
    train_with(regularized, 0.0)
    assert_equal_weights(decayed, regularized, tolerance)
    assert not torch.allclose(bare.rnn.weight_hh_l0, regularized.rnn.weight_hh_l0, atol=1e-6)

    ball = regkit.attach(bounded, L2_AND_BALL)
    train_with(bounded, 0.0)
    assert ball.violations()["ball"] < 1e-9
    assert largest_row(bounded) <= BOUND + 1e-9 < largest_row(bare)
    return attachment
