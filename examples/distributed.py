"""An LSTM trained by several processes, with the document distributed.json, and once more by one process.

torchrun --nproc-per-node 2 examples/distributed.py           each process has the whole model (DDP)
torchrun --nproc-per-node 2 examples/distributed.py --fsdp2   each process has a part of every weight (fully_shard)

Every process trains on its share of each batch. regkit is in three marked lines, the same for one process and for many.
At the end the first process trains alone on whole batches: the weights must be equal, or the program fails.

The task is the adding problem (Hochreiter & Schmidhuber 1997): the sum of those two numbers of a sequence that are
marked.
"""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

import regkit

SPEC = Path(__file__).with_name("distributed.json")
TOLERANCE = 1e-6
TIME, BATCH = 8, 32


class Adder(nn.Module):
    """Reads a sequence, and says a number."""

    def __init__(self, hidden: int = 24) -> None:
        super().__init__()
        self.rnn = nn.LSTM(2, hidden)
        self.head = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (time, batch, 2) -> (batch, 1)"""
        number: Tensor = self.head(self.rnn(x)[0][-1])
        return number


def make_batches(steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Numbers beside marks, and the sum of the two numbers that are marked: the same ones in every process."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        numbers = torch.rand(TIME, BATCH, generator=generator)
        marked = torch.rand(TIME, BATCH, generator=generator).topk(2, dim=0).indices
        marks = torch.zeros(TIME, BATCH).scatter_(0, marked, 1.0)
        yield torch.stack([numbers, marks], dim=-1), (numbers * marks).sum(0).unsqueeze(-1)


@dataclass(frozen=True)
class Run:
    """What came out of a training run."""

    loss: Tensor
    values: dict[str, Tensor]
    violations: dict[str, Tensor]
    weights: dict[str, Tensor]


def train(steps: int, part: int = 0, parts: int = 1, fsdp2: bool = False) -> Run:
    """Train one of `parts` equal shares of each batch, in as many processes."""
    torch.manual_seed(0)
    model: nn.Module = Adder()
    if parts > 1 and fsdp2:
        fully_shard(model)
    elif parts > 1:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with regkit.attach(model, SPEC) as attachment:  # regkit: before or after the model is spread
        for x, y in make_batches(steps):
            x, y = x.chunk(parts, dim=1)[part], y.chunk(parts)[part]
            loss = mse_loss(model(x), y)
            loss = loss + attachment.penalty()  # regkit
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
            optimizer.step()
            optimizer.zero_grad()
        values, violations = attachment.values(), attachment.violations()  # regkit: in every process, as any collective
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=parts > 1))
    return Run(loss.detach(), values, violations, {key: w for key, w in weights.items() if isinstance(w, Tensor)})


def mean(value: Tensor) -> float:
    """Over the processes: a loss and an activity penalty are those of a share, and of a weight all have the same."""
    total = value.clone()
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def numbers(run: Run, shared: bool) -> list[float]:
    """The columns of the table."""
    columns = [run.loss, *run.values.values(), *run.violations.values()]
    return [mean(value) if shared else float(value) for value in columns]


def report(many: Run, averages: list[float], alone: Run, name: str) -> float:
    """Print both runs.  -> the largest difference of a weight"""
    table = Table("trained by", "loss", *many.values, *(f"{rule}: beyond" for rule in many.violations))
    for row, columns in ((name, averages), ("1 process", numbers(alone, shared=False))):
        table.add_row(row, *(f"{column:.6f}" for column in columns))
    difference = max(float((many.weights[key] - weight).abs().max()) for key, weight in alone.weights.items())
    console = Console(width=100)
    console.print(table)
    console.print(f"largest difference of a weight: {difference:.1e}")
    return difference


def main() -> None:
    """Train in all processes, then in one, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fsdp2", action="store_true", help="shard every weight, instead of copying it")
    parser.add_argument("--steps", type=int, default=300, help="default: %(default)s")
    options = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it with torchrun --nproc-per-node 2 examples/distributed.py")
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    if BATCH % size:
        parser.error(f"a batch of {BATCH} has no {size} equal shares")
    many = train(options.steps, rank, size, options.fsdp2)
    averages = numbers(many, shared=True)
    gc.collect()  # where a DDP model outlives its process group, torch may hang
    dist.destroy_process_group()
    if rank == 0:
        way = "one copy" if size == 1 else "fully_shard" if options.fsdp2 else "DDP"
        difference = report(many, averages, train(options.steps), f"{size} processes, {way}")
        if difference > TOLERANCE:
            raise SystemExit(f"the weights differ by more than {TOLERANCE}")


if __name__ == "__main__":
    main()
