"""What the processes of a world do besides training: each task returns what a test looks at."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import regkit
from regkit.runtime.sharding import sharded, share, whole
from tests.support.distributed.spreads import (
    MatmulCell,
    Net,
    Spread,
    by_rank,
    ddp,
    fsdp,
    make_net,
    mesh,
    one_process,
    tensor_parallel_rows,
)
from tests.support.distributed.workers import Outcome, Rules, Task, batches, full, loss_of, outcome

DECAY = 0.1
L2: Rules = [{"name": "l2", "penalty": {"kind": "l2", "strength": DECAY / 2}}]
MAX_NORM: Rules = [{"name": "max-norm", "constraint": {"kind": "max_norm", "max_value": 0.3}}]
ACTIVITY: Rules = [{"name": "ar", "penalty": {"kind": "activity_l2", "strength": 1.0}}]
RISING: Rules = [{**L2[0], "schedule": {"kind": "linear", "start": 0.0, "end": 1.0, "steps": 4}}, *MAX_NORM, *ACTIVITY]

# --- shards ----------------------------------------------------------------------------------------------------------


def _placed(tensor: Tensor, placements: tuple[Placement, ...]) -> DTensor:
    """The tensor so placed on all processes; where it is a sum to be taken, of equal parts."""
    over = mesh() if len(placements) == 1 else mesh("data", "tensor")
    held = [Replicate() if isinstance(placement, Partial) else placement for placement in placements]
    parts = 2 ** sum(isinstance(placement, Partial) for placement in placements)
    local = distribute_tensor(tensor, over, held).to_local() / parts
    return DTensor.from_local(local, over, placements, shape=tensor.shape, stride=tensor.stride(), run_check=False)


SHAPES = {"even": (8, 4), "uneven": (7, 5), "fewer rows than processes": (1, 5), "vector": (5,)}


def placements_of(dimensions: int, shape: tuple[int, ...]) -> list[tuple[Placement, ...]]:
    """Every way to place a tensor of this shape on a mesh of so many dimensions."""
    each = [Replicate(), Partial(), *(Shard(dimension) for dimension in range(len(shape)))]
    return list(itertools.product(each, repeat=dimensions))


def shares(folder: Path, shape: tuple[int, ...], dimensions: int) -> dict[str, dict[str, Tensor | int]]:
    """A part of another tensor, taken after the example of one that is placed in every way, and added to it."""
    generator = torch.Generator().manual_seed(0)
    placed, other = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    found: dict[str, dict[str, Tensor | int]] = {}
    for placements in placements_of(dimensions, shape):
        like = _placed(placed, placements)
        with CommDebugMode() as communication:
            part = share(other, like)
        assert part.placements == like.placements
        assert part.to_local().shape == like.to_local().shape
        sent = communication.get_total_counts()
        found[str(placements)] = {"sent": sent, "whole": whole(part), "sum": whole(like.add_(part))}
    return {"expected": {"whole": other, "sum": placed + other}, **found}


def gradient_through_whole(folder: Path) -> Tensor:
    """Of Σ w³ of the whole, at a weight of which each process has some rows."""
    weight = nn.Parameter(distribute_tensor(torch.arange(15.0).reshape(5, 3), mesh(), [Shard(0)]))
    whole(weight).pow(3).sum().backward()
    assert weight.grad is not None
    assert sharded(weight.grad)
    return full(weight.grad)


# --- what torch leaves whole, or casts ----------------------------------------------------------------------


def constrained_after_evaluation(folder: Path) -> dict[str, Tensor]:
    """apply_constraints() where FSDP2 left whole parameters in the modules, and what the next pass then sees."""
    net = make_net()
    fully_shard(net)
    with regkit.attach(net, {"rules": MAX_NORM}) as attachment, torch.no_grad():
        net(batches()[0][0])
        attachment.apply_constraints()
        seen = attachment.violations()["max-norm"]
        net(batches()[0][0])
        net.reshard()
        return {"at once": seen, "afterwards": attachment.violations()["max-norm"]}


def attached_after_evaluation(folder: Path) -> bool:
    """attach(optimizer=...) where FSDP2 left whole parameters in the modules, which the optimizer does not own."""
    net = make_net()
    fully_shard(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with torch.no_grad():
        net(batches()[0][0])
    found_whole = not sharded(net.rnn.weight_hh_l0)
    with regkit.attach(net, {"rules": L2}, optimizer=optimizer):
        return found_whole and sharded(net.rnn.weight_hh_l0)


def states_of_a_new_optimizer(folder: Path) -> tuple[int, bool]:
    """The step count, and whether weights are as before, once torch has had the optimizer make its state."""
    net = make_net()
    fully_shard(net)
    with regkit.attach(net, {"rules": [*L2, *MAX_NORM, *ACTIVITY]}) as attachment:
        before = {name: full(parameter) for name, parameter in net.named_parameters()}
        get_state_dict(net, torch.optim.Adam(net.parameters()))
        same = all(torch.equal(full(parameter), before[name]) for name, parameter in net.named_parameters())
        return attachment.step_count, same


def decayed_under_bfloat16(folder: Path) -> Outcome:
    """Decay alone, the loss having no gradient, where FSDP2 keeps float32 and computes in bfloat16."""
    net = make_net().float()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    spread = by_rank(fully_shard(net, mp_policy=policy))
    optimizer = torch.optim.SGD(net.rnn.parameters(), lr=0.5)
    with regkit.attach(net, {"rules": L2}):
        for x, _ in batches():
            optimizer.zero_grad()
            (net(spread.mine(x).float()) * 0).sum().backward()
            optimizer.step()
    return {name: full(parameter) for name, parameter in net.rnn.named_parameters()}


CONVERTED = ("FSDP2", "tensor parallel")


def converted(folder: Path, spread: str, alone: bool = False) -> Outcome:
    """Trained in float32, to which the model was converted after attach(): torch swaps sharded parameters then."""
    make, over = SPREADS[spread]
    net = make()
    there = one_process(net) if alone else over(net)
    with regkit.attach(there.module, {"rules": [*L2, *MAX_NORM]}) as attachment:
        there.module.float()
        optimizer = torch.optim.SGD(there.module.parameters(), lr=0.1)
        for x, y in batches():
            optimizer.zero_grad()
            loss_of(there, x.float(), y.float()).backward()
            optimizer.step()
        return outcome(net, attachment)


# --- saved and loaded -------------------------------------------------------------------------------------------------


def _cell_net() -> Net:
    net = make_net("MatmulCell")
    assert isinstance(net.rnn, MatmulCell)
    return net


SPREADS = {"DDP": (make_net, ddp), "FSDP2": (make_net, fsdp), "tensor parallel": (_cell_net, tensor_parallel_rows)}


def resumed(folder: Path, spread: str) -> tuple[int, Outcome, Outcome]:
    """The step count that was loaded; what a run in two halves came to, and what one that was not interrupted did."""
    make, over = SPREADS[spread]

    def start() -> tuple[Net, Spread, regkit.Attachment, torch.optim.Optimizer]:
        net = make()
        there = over(net)
        attachment = regkit.attach(there.module, {"rules": RISING})
        return net, there, attachment, torch.optim.Adam(there.module.parameters(), lr=0.05)

    def go(there: Spread, attachment: regkit.Attachment, optimizer: torch.optim.Optimizer, part: slice) -> None:
        for x, y in batches()[part]:
            optimizer.zero_grad()
            (loss_of(there, x, y) + attachment.penalty()).backward()
            optimizer.step()

    place = str(folder / f"resumed {spread}")
    net, there, attachment, optimizer = start()
    with attachment:
        go(there, attachment, optimizer, slice(2))
        weights, moments = get_state_dict(there.module, optimizer)
        dcp.save({"model": weights, "optim": moments, "regkit": attachment}, checkpoint_id=place)
        go(there, attachment, optimizer, slice(2, None))
        expected = outcome(net, attachment)
    net, there, attachment, optimizer = start()
    with attachment:
        weights, moments = get_state_dict(there.module, optimizer)
        dcp.load({"model": weights, "optim": moments, "regkit": attachment}, checkpoint_id=place)
        set_state_dict(there.module, optimizer, model_state_dict=weights, optim_state_dict=moments)
        count = attachment.step_count
        go(there, attachment, optimizer, slice(2, None))
        return count, outcome(net, attachment), expected


def of_size(size: int) -> dict[str, Task]:
    """The tasks of a world of so many processes, by name."""
    sharing = {
        f"shares of {name}": partial(shares, shape=shape, dimensions=size // 2) for name, shape in SHAPES.items()
    }
    if size == 4:
        return sharing
    own = (
        gradient_through_whole,
        constrained_after_evaluation,
        attached_after_evaluation,
        states_of_a_new_optimizer,
        decayed_under_bfloat16,
    )
    converting = {f"converted {spread}": partial(converted, spread=spread) for spread in CONVERTED}
    saved = {f"resumed {spread}": partial(resumed, spread=spread) for spread in SPREADS}
    return {**sharing, **{task.__name__: task for task in own}, **converting, **saved}
