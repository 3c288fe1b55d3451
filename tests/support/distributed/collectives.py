"""What processes say to one another at a step, at a report and at a look for NaN."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import regkit
from regkit.runtime.sharding import sharded
from tests.support.distributed.spreads import (
    Net,
    Spread,
    fsdp,
    fsdp_by_columns,
    make_net,
    mesh,
    tensor_parallel_columns,
)
from tests.support.distributed.workers import Rules, Task, batches, full, loss_of

KERNEL, RECURRENT = {"role": "kernel"}, {"role": "recurrent"}
MATRICES = {"role": ["kernel", "recurrent"]}


def ball(per: str, **rest: Any) -> dict[str, Any]:
    return {"constraint": {"kind": "max_norm", "max_value": 0.4, "per": per}, **rest}


SHARDS_ALONE: dict[str, Rules] = {
    "l2": [{"penalty": "l2(0.1)"}],
    "l1": [{"penalty": "l1(0.1)"}],
    "elastic net": [{"penalty": "l1_l2(0.1, 0.2)"}],
    "l2 on gates": [{"penalty": "l2(0.1)", "target": {"gate": ["forget", "cell"]}}],
    "l1, proximal": [{"penalty": "l1(0.1)", "via": "proximal"}],
    "l2, decoupled": [{"penalty": "l2(0.1)", "via": "decoupled"}],
    "non-negative": [{"constraint": "non_negative"}],
    "max-norm": [ball("unit")],
    "unit-norm": [{"constraint": "unit_norm"}],
    "max-norm on gates": [ball("unit", target={"gate": ["output"]})],
    "three at once": [{"penalty": "l2(0.1)"}, ball("unit"), {"constraint": "non_negative"}],
}
"""Rules for which a process needs no more than it holds."""

SUMS: dict[str, Rules] = {
    "per input": [ball("input", target=MATRICES)],
    "per matrix": [ball("matrix", target=MATRICES)],
    "of gates": [ball("input", target={**RECURRENT, "gate": ["forget"]})],
}
"""Rules that need sums over all shards."""

ORTHOGONAL = {"penalty": "orthogonal(0.1)", "target": RECURRENT}
WHOLE: dict[str, tuple[int, Rules]] = {
    "two penalties": (1, [ORTHOGONAL, {"penalty": "cosine_orthogonal(0.1)", "target": RECURRENT}]),
    "two constraints": (
        2,
        [ball("cell", target=MATRICES), ball("cell", target=RECURRENT), ball("cell", target=KERNEL)],
    ),
    "before and after the update": (2, [ORTHOGONAL, ball("cell", target=RECURRENT)]),
    "gates": (1, [{**ORTHOGONAL, "target": {**RECURRENT, "gate": ["forget", "cell"]}}]),
}
"""Rules that need whole weights, and how many gathers that takes: one for each weight before the update, one after."""

Counts = dict[str, int]


def counted(run: Callable[[], Any]) -> Counts:
    """The collectives of a function, by name."""
    with CommDebugMode() as communication:
        run()
    return {str(name).rpartition(".")[-1]: count for name, count in communication.get_comm_counts().items()}


def of_a_step(rules: Rules, spread: Callable[[Net], Spread], layer: str, folder: Path) -> dict[str, Counts]:
    """The collectives of a steady step, of `values()` and of `violations()`."""
    net = make_net(layer, 4)
    with regkit.attach(net, {"rules": rules}) as attachment:
        there = spread(net)
        optimizer = there.optimizer(there.module.parameters(), lr=0.05)
        found: Counts = {}
        for x, y in batches():
            optimizer.zero_grad()
            loss_of(there, x, y).backward()
            found = counted(optimizer.step)
        return {"step": found, "values": counted(attachment.values), "violations": counted(attachment.violations)}


def nan_in_one_shard(at: str, folder: Path) -> str | None:
    """What every process says of a NaN that one of them holds, and how a look without one is answered."""
    net = make_net()
    there = fsdp(net)
    weight = net.rnn.weight_hh_l0
    assert sharded(weight)

    def spoil() -> None:
        if dist.get_rank() == dist.get_world_size() - 1:
            with torch.no_grad():
                weight.to_local()[-1, -1] = torch.nan

    if at == "attach":
        spoil()
    try:
        attachment = regkit.attach(net, {"rules": SHARDS_ALONE["l2"]})
        with attachment:
            optimizer = there.optimizer(there.module.parameters(), lr=0.1)
            loss_of(there, *batches()[0]).backward()
            spoil()
            optimizer.step()
    except regkit.RegkitError as error:
        return str(error)
    return None


def placed_otherwise(folder: Path) -> dict[str, float]:
    """What a penalty and a constraint make of a weight that is placed in another way from one step to the next."""
    net = nn.RNN(4, 4, bias=False)
    over = mesh()
    for name, weight in list(net.named_parameters()):
        setattr(net, name, nn.Parameter(distribute_tensor(torch.ones_like(weight), over, [Shard(0)])))
    rules = [{"name": "l2", "penalty": "l2(1)", "target": RECURRENT}, ball("unit", name="ball", target=RECURRENT)]
    with regkit.attach(net, {"rules": rules}) as attachment:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        moved = nn.Parameter(distribute_tensor(torch.full((4, 4), 3.0), over, [Replicate()]))
        torch.utils.swap_tensors(net.weight_hh_l0, moved)
        value = float(attachment.values()["l2"])
        net.weight_hh_l0.grad = torch.zeros_like(net.weight_hh_l0)
        optimizer.step()
        norms = full(net.weight_hh_l0).norm(dim=1)
        return {"value": value, "norm": float(norms.max()), "violation": float(attachment.violations()["ball"])}


SPREADS: dict[str, tuple[Callable[[Net], Spread], str]] = {
    "rows": (fsdp, "LSTM"),
    "columns": (fsdp_by_columns, "LSTM"),
    "tensor parallel columns": (tensor_parallel_columns, "MatmulCell"),
}


def of_size(size: int) -> dict[str, Task]:
    """The tasks of a world of so many processes, by name."""
    if size != 2:
        return {}
    documents = {**SHARDS_ALONE, **SUMS, **{name: rules for name, (_, rules) in WHOLE.items()}}
    found: dict[str, Task] = {
        f"collectives of {name}, {how}": partial(of_a_step, rules, spread, layer)
        for name, rules in documents.items()
        for how, (spread, layer) in SPREADS.items()
    }
    found["placed_otherwise"] = placed_otherwise
    return {**found, **{f"nan at {at}": partial(nan_in_one_shard, at) for at in ("attach", "a step")}}
