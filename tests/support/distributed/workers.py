"""What is trained in one process and in several, and the worlds of processes that it is trained in.

A world is some processes that are started once and go through every task; each saves what it got from each.
"""

from __future__ import annotations

import gc
import tempfile
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import regkit
from tests.support.distributed.spreads import Net, Spread, make_net, one_process

Rules = list[dict[str, Any]]
Outcome = dict[str, Tensor]

LR, STEPS = 0.1, 3
OF_A_SHARE = ("value of ar", "value of tar")
"""What each process has of its own share of the batch."""


def batches(count: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    """Sequences with targets, (time, batch, features), of a batch that two and four processes can share."""
    generator = torch.Generator().manual_seed(2)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    return [(draw(4, 8, 3), draw(4, 8, 2)) for _ in range(count)]


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor, by torch's own means."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


# --- the loop --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Case:
    """A document, a model, how it is spread and how it is trained.

    evaluate: a forward pass without gradients stands between each backward pass and its step; look: values() and
    violations() are read between each forward and its backward pass.
    """

    spread: Callable[[Net], Spread]
    rules: Rules
    sizes: tuple[int, ...] = (2,)
    attach_first: bool = True
    layer: str = "LSTM"
    hidden: int = 5
    spare: bool = False
    computed: str = ""
    accumulate: int = 1
    clip: float | None = None
    evaluate: bool = False
    look: bool = False


def _holding_back(module: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Gradients wait for the last batch to be sent, as each library has it."""
    if isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    return nullcontext()


def train(case: Case, attachment: regkit.Attachment, spread: Spread) -> None:
    """An ordinary loop: what each process adds to the loss of its share is the mean over that share."""
    optimizer = spread.optimizer(spread.module.parameters(), lr=LR, momentum=0.9)
    for index, (x, y) in enumerate(batches(STEPS * case.accumulate)):
        last = (index + 1) % case.accumulate == 0
        with _holding_back(spread.module, last):
            loss = loss_of(spread, x, y) + attachment.penalty()
            if case.look:
                attachment.values(), attachment.violations()
            (loss / case.accumulate).backward()
        if not last:
            continue
        if case.clip is not None:
            nn.utils.clip_grad_norm_(spread.module.parameters(), case.clip)
        if case.evaluate:
            with torch.no_grad():
                spread.module(spread.mine(x))
        optimizer.step()
        optimizer.zero_grad()


def loss_of(spread: Spread, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.mse_loss(spread.module(spread.mine(x)), spread.mine(y))


def outcome(net: nn.Module, attachment: regkit.Attachment) -> Outcome:
    """The whole weights, what else the model keeps, and what the attachment says of them."""
    weights = {name: full(tensor) for name, tensor in [*net.named_parameters(), *net.named_buffers()]}
    values = {f"value of {rule}": value for rule, value in attachment.values().items()}
    violations = {f"violation of {rule}": value for rule, value in attachment.violations().items()}
    return {**weights, **values, **violations}


def run(case: Case, spread: Callable[[Net], Spread] | None = None) -> Outcome:
    """Train a case, spread as it says, or as is said here."""
    net = make_net(case.layer, case.hidden, case.spare, case.computed)
    there = None if case.attach_first else (spread or case.spread)(net)
    with regkit.attach(net if there is None else there.module, {"rules": case.rules}) as attachment:
        there = there or (spread or case.spread)(net)
        train(case, attachment, there)
        return outcome(net, attachment)


def run_alone(case: Case) -> Outcome:
    """Train a case on whole batches in this process."""
    return run(case, one_process)


def together(found: list[Outcome]) -> Outcome:
    """What all processes got, which must be the same bit by bit; of what is of a share, the mean."""
    for other in found[1:]:
        for name in set(found[0]) - set(OF_A_SHARE):
            assert torch.equal(found[0][name], other[name]), f"the processes differ in {name}"
    return {name: torch.stack([one[name] for one in found]).mean(0) for name in found[0]}


def assert_same(found: Outcome, expected: Outcome, tolerance: float) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


# --- the world -------------------------------------------------------------------------------------------------------

Task = Callable[[Path], Any]
"""What every process of a world does. It is given a folder that they share."""


@dataclass(frozen=True)
class CaseTask:
    """The task to train a case."""

    case: Case

    def __call__(self, folder: Path) -> Outcome:
        return run(self.case)


def live(rank: int, size: int, folder: Path, tasks: Mapping[str, Task]) -> None:
    """One process of a world: what each task returns, or its traceback, is saved."""
    torch.set_num_threads(1)
    where = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    found: dict[str, Any] = {}
    for name, task in tasks.items():
        try:
            found[name] = task(folder)
        except Exception:
            found[name] = Failure(traceback.format_exc())
        dist.barrier()
    torch.save(found, folder / f"{rank}.pt")
    gc.collect()  # where a DDP model outlives its process group, torch may hang
    dist.destroy_process_group()


@dataclass(frozen=True)
class Failure:
    """The traceback of a task that failed."""

    trace: str


# A process takes seconds to import all this, so one does, and the others are forked from it.
processes.set_forkserver_preload(
    ["regkit", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp", "torch.distributed.tensor.debug"]
)


class World:
    """What the processes of a world found."""

    def __init__(self, size: int, tasks: Mapping[str, Task]) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            processes.start_processes(live, (size, folder, tasks), nprocs=size, start_method="forkserver")
            self._found = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]

    def found(self, task: str) -> list[Any]:
        """What each process got from a task. Raises AssertionError where one failed."""
        found = [one[task] for one in self._found]
        for rank, one in enumerate(found):
            assert not isinstance(one, Failure), f"process {rank} failed:\n{one.trace}"
        return found
