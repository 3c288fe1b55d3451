"""Training loops as people write them, and the optimizers in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

DECAY = 0.1
RULE = {"rules": [{"penalty": {"kind": "l2", "strength": DECAY / 2}}]}
Batches = list[tuple[Tensor, Tensor]]
MakeOptimizer = Callable[..., torch.optim.Optimizer]


def rnn_groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Parameter groups with weight decay on the recurrent module alone."""
    return [
        {"params": list(model.rnn.parameters()), "weight_decay": decay},
        {"params": list(model.head.parameters()), "weight_decay": 0.0},
    ]


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.mse_loss(model(x), y)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches) -> None:
    for x, y in batches:
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()


def train_with_closure(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches) -> None:
    for x, y in batches:

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, x, y)
            loss.backward()
            return loss

        optimizer.step(closure)


def train_accumulating(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches) -> None:
    for pair in (batches[:2], batches[2:]):
        optimizer.zero_grad()
        for x, y in pair:
            (loss_of(model, x, y) / 2).backward()
        optimizer.step()


def train_clipping(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches) -> None:
    for x, y in batches:
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()


def train_with_scaler(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for x, y in batches:
        optimizer.zero_grad()
        scaler.scale(loss_of(model, x, y)).backward()
        scaler.step(optimizer)
        scaler.update()


def train_unscaling(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for x, y in batches:
        optimizer.zero_grad()
        scaler.scale(loss_of(model, x, y)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        scaler.step(optimizer)
        scaler.update()


OPTIMIZERS: dict[str, MakeOptimizer] = {
    "SGD single": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=False),
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "Adam single": lambda p: torch.optim.Adam(p, lr=0.01, foreach=False),
    "Adam foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "Adam capturable lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01), foreach=False),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "Adagrad fused": lambda p: torch.optim.Adagrad(p, lr=0.01, fused=True),
}
LOOPS = [train, train_with_closure, train_accumulating, train_clipping]
SCALED_LOOPS = [train_with_scaler, train_unscaling]


def assert_equal_weights(one: nn.Module, other: nn.Module, tolerance: float = 1e-9) -> None:
    for (name, ours), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
