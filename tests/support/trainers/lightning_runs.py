"""Lightning runs of the shared models, and the same loops written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.support.loops import Batches, loss_of, rnn_groups

SILENCED = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # Lightning's advice
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning"),  # Lightning's use of torch
]


class Automatic(LightningModule):
    """A module written without regkit in mind; weight decay is on its recurrent layers alone."""

    def __init__(self, model: nn.Module, decay: float = 0.0, lr: float = 0.1) -> None:
        super().__init__()
        self.model, self.decay, self.lr = model, decay, lr

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        return loss_of(self.model, *batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(rnn_groups(self.model, self.decay), lr=self.lr, momentum=0.9)


class Manual(Automatic):
    """The same, with its own backward passes and steps."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss_of(self.model, *batch))
        optimizer.step()


def loader(batches: Batches) -> DataLoader:
    return DataLoader(batches, batch_size=None)


def trainer(**options: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(**{"accelerator": "cpu", "max_epochs": 1, "enable_model_summary": False, **quiet, **options})


def fit(module: LightningModule, batches: Batches, **options: Any) -> Trainer:
    run = trainer(**options)
    run.fit(module, loader(batches))
    return run


def by_hand(
    model: nn.Module,
    batches: Batches,
    *,
    accumulate: int = 1,
    clip: float | None = None,
    scaler: torch.amp.GradScaler | None = None,
    autocast: torch.dtype | None = None,
    decay: float = 0.0,
    penalty: Callable[[], Tensor | float] = lambda: 0.0,
    after: Callable[[], object] = lambda: None,
) -> None:
    """What the Trainer does, in one page of plain torch."""
    optimizer = Automatic(model, decay).configure_optimizers()
    for n, (x, y) in enumerate(batches):
        if n % accumulate == 0:
            optimizer.zero_grad()
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None, cache_enabled=False):
            loss = loss_of(model, x, y)
        loss = (loss + penalty()) / accumulate
        (loss if scaler is None else scaler.scale(loss)).backward()
        if (n + 1) % accumulate:
            continue
        if scaler is not None:
            scaler.unscale_(optimizer)
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        after()


def scaler(**options: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", **{"init_scale": 1024.0, **options})


def mixed(**options: Any) -> dict[str, Any]:
    """The Trainer's options for float16 on a CPU, which it has no short name for."""
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler(**options))]}


Row = tuple[type[Automatic], Callable[[], dict[str, Any]], Callable[[], dict[str, Any]]]

RUNS: dict[str, Row] = {
    "automatic": (Automatic, dict, dict),
    "manual": (Manual, dict, dict),
    "accumulation": (
        Automatic,
        lambda: {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05},
        lambda: {"accumulate": 2, "clip": 0.05},
    ),
    "16-mixed": (Automatic, mixed, lambda: {"scaler": scaler(), "autocast": torch.float16}),
    "16-mixed manual": (Manual, mixed, lambda: {"scaler": scaler(), "autocast": torch.float16}),
    "16-mixed accumulation": (
        Automatic,
        lambda: {**mixed(), "accumulate_grad_batches": 2, "gradient_clip_val": 0.05},
        lambda: {"scaler": scaler(), "autocast": torch.float16, "accumulate": 2, "clip": 0.05},
    ),
    "bf16-mixed": (Automatic, lambda: {"precision": "bf16-mixed"}, lambda: {"autocast": torch.bfloat16}),
}
"""Each run: its module, the Trainer's options, and the same for the loop written by hand."""

LABELS = {
    "automatic": "Lightning: automatic optimization",
    "manual": "Lightning: manual optimization",
    "accumulation": "Lightning: accumulation and clipping",
    "16-mixed": "Lightning: 16-mixed",
    "16-mixed manual": "Lightning: 16-mixed",
    "16-mixed accumulation": "Lightning: 16-mixed",
    "bf16-mixed": "Lightning: bf16-mixed",
}

TOLERANCE = {run: 1e-6 if "mixed" in run else 1e-9 for run in RUNS} | {"bf16-mixed": 2e-4}
"""In bfloat16, of 8 bits, the gradients of an output add up to something else in another order."""


def prepared(run: str, make_model: Callable[..., nn.Module], batches: Batches) -> tuple[Any, Batches]:
    """A maker of equal models, and batches, that a run can compute with."""
    dtype = torch.float32 if "mixed" in run else torch.float64  # which autocast leaves alone
    layer = nn.GRU if run.startswith("16-mixed") else nn.LSTM  # which CPUs cannot do in float16
    return lambda: make_model(layer).to(dtype), [(x.to(dtype), y.to(dtype)) for x, y in batches]
