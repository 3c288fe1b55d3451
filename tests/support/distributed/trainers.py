"""What Lightning and Accelerate train in a world of two processes that torchrun would have started."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import regkit
from regkit.integrations.lightning import RegularizationCallback
from tests.support.distributed.spreads import Net, make_net
from tests.support.distributed.workers import Outcome, Rules, Task, full

BATCH = 8
WEIGHTS: Rules = [
    {"penalty": {"kind": "l2", "strength": 0.05}},
    {"target": {"role": "recurrent"}, "penalty": {"kind": "orthogonal", "strength": 0.02}},
    {"penalty": {"kind": "l1", "strength": 0.05}, "via": "proximal"},
    {"constraint": {"kind": "max_norm", "max_value": 0.5}},
]
ACTIVITY: Rules = [{"penalty": {"kind": "activity_l2", "strength": 2.0}}]


def loader(batch: int, distributed: bool = False) -> DataLoader[tuple[Tensor, ...]]:
    """Sequences with targets, in the same order at every call. One that is distributed has every second of them."""
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(4 * BATCH, 6, size, generator=generator, dtype=torch.float64) for size in (3, 2))
    data = TensorDataset(x, y)
    return DataLoader(data, batch, sampler=DistributedSampler(data, shuffle=False) if distributed else None)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """x, y: (batch, time, features)"""
    return nn.functional.mse_loss(model(x.transpose(0, 1)), y.transpose(0, 1))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def trained_by_hand(rules: Rules) -> Outcome:
    """One process, whole batches, plain torch."""
    net = make_net()
    optimizer = sgd(net)
    with regkit.attach(net, {"rules": rules}) as attachment:
        for x, y in loader(BATCH):
            optimizer.zero_grad()
            (loss_of(net, x, y) + attachment.penalty()).backward()
            optimizer.step()
    return weights(net)


def weights(net: nn.Module) -> Outcome:
    return {name: full(parameter) for name, parameter in net.named_parameters()}


# --- Lightning -------------------------------------------------------------------------------------------------------


class Module(LightningModule):
    """A module written without regkit in mind."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return loss_of(self.net, *batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return sgd(self.net)


class Sharded(Module):
    """As Lightning wants a module that is sharded."""

    def configure_model(self) -> None:
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def fit(module: LightningModule, **options: Any) -> Outcome:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(accelerator="cpu", devices=2, max_epochs=1, **quiet, **options)
    trainer.fit(module, loader(BATCH // 2, distributed=True))
    assert trainer.world_size == 2
    return weights(module.net)


def lightning_ddp(folder: Path) -> Outcome:
    module = Module(make_net())
    with regkit.attach(module, {"rules": WEIGHTS}):
        return fit(module, strategy="ddp")


def lightning_ddp_with_callback(folder: Path) -> Outcome:
    callback = RegularizationCallback({"rules": [*WEIGHTS, *ACTIVITY]})
    found = fit(Module(make_net()), strategy="ddp", callbacks=[callback])
    callback.attachment.detach()
    return found


def lightning_fsdp2(folder: Path) -> Outcome:
    module = Sharded(make_net())
    with regkit.attach(module, {"rules": WEIGHTS}):
        return fit(module, strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1))


# --- Accelerate ------------------------------------------------------------------------------------------------------


def accelerate_ddp(folder: Path) -> Outcome:
    """A loop as Accelerate's documentation writes it, attached to what `prepare` has made."""
    accelerator = Accelerator(cpu=True)
    net = make_net()
    model, optimizer, batches = accelerator.prepare(net, sgd(net), loader(BATCH // 2))
    with regkit.attach(model, {"rules": [*WEIGHTS, *ACTIVITY]}) as attachment:
        for x, y in batches:
            accelerator.backward(loss_of(model, x, y) + attachment.penalty())
            optimizer.step()
            optimizer.zero_grad()
    assert accelerator.num_processes == 2
    return weights(net)


def as_torchrun(task: Task, folder: Path) -> Any:
    """The task, where the environment says what torchrun says."""
    rank = str(dist.get_rank())
    said = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ.update(said, MASTER_ADDR="localhost", MASTER_PORT="0", TORCHELASTIC_RUN_ID="none")
    return task(folder)


_ALL = (lightning_ddp, lightning_ddp_with_callback, lightning_fsdp2, accelerate_ddp)
TASKS: Mapping[str, Task] = {task.__name__: partial(as_torchrun, task) for task in _ALL}
