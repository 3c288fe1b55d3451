"""Activity rules for Lightning runs, and the same penalties by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

SPEC = {
    "rules": [
        {"name": "ar", "penalty": "activity_l2(2)"},
        {"name": "tar", "penalty": "temporal(1)"},
        {"name": "decay", "target": {"role": "recurrent"}, "penalty": "l2(0.05)", "via": "loss"},
    ]
}
ACTIVITY = {"rules": SPEC["rules"][:2]}


def wide(h: Tensor) -> Tensor:
    return h.float() if h.dtype in (torch.float16, torch.bfloat16) else h


def ar_tar(h: Tensor) -> Tensor:
    return 2.0 * wide(h).square().mean() + (wide(h[1:]) - wide(h[:-1])).square().mean()


def watched(model: nn.Module, spec: dict[str, Any] = SPEC) -> Callable[[], Tensor]:
    """The penalty of all that the recurrent layer has put out since the last call, by hand."""
    seen: list[Tensor] = []
    model.rnn.register_forward_hook(lambda module, args, output: seen.append(output[0]))

    def penalty() -> Tensor:
        decay = 0.05 * model.rnn.weight_hh_l0.square().sum() if spec is SPEC else 0.0
        value = ar_tar(torch.cat(seen, dim=1)) + decay
        seen.clear()
        return value

    return penalty
