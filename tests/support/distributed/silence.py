"""What must be told in every process and make none wait for another, and what must not be told at all."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.debug import CommDebugMode

import regkit
from tests.support.distributed.spreads import (
    Net,
    Spread,
    by_rank,
    ddp,
    fsdp,
    fsdp_left_whole,
    make_net,
    tensor_parallel_rows,
)
from tests.support.distributed.tasks import ACTIVITY, L2, MAX_NORM
from tests.support.distributed.workers import Rules, Task, batches, loss_of

# --- what FSDP1 flattens ---------------------------------------------------------------------------------------------

FSDP1_RULES: dict[str, Rules] = {"weights": L2, "activity": ACTIVITY}
FSDP1_STEPS = ("any optimizer", "one optimizer", "by hand")


def fsdp1(rules: str, attach_first: bool, use_orig_params: bool, steps: str, folder: Path) -> list[str]:
    """What is raised of a model that FSDP1 flattens: as it is attached to, or else in each of two iterations."""
    net = make_net()

    def attach(module: nn.Module) -> regkit.Attachment:
        only = torch.optim.SGD(module.parameters(), lr=0.1) if steps == "one optimizer" else None
        return regkit.attach(module, {"rules": FSDP1_RULES[rules]}, optimizer=only)

    attachment = attach(net) if attach_first else None
    module = FullyShardedDataParallel(net, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    try:
        attachment = attachment or attach(module)
    except regkit.RegkitError as error:
        return [str(error)]
    errors = []
    with attachment:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for x, y in batches(2):
            (loss_of(by_rank(module), x, y) + attachment.penalty()).backward()
            try:
                with attachment.step(lr=0.1) if steps == "by hand" else nullcontext():
                    optimizer.step()
            except regkit.RegkitError as error:
                errors.append(str(error))
    return errors


FSDP1_CASES = tuple(itertools.product(FSDP1_RULES, (True, False), (True, False), FSDP1_STEPS))


# --- what must not make processes wait for one another ----------------------------------------------------------------


def forgotten_penalty(folder: Path) -> str:
    """What is raised, in every process alike, where what was recorded is not in the loss."""
    net = make_net()
    spread = fsdp(net)
    with regkit.attach(net, {"rules": [*L2, *ACTIVITY]}):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        loss_of(spread, *batches()[0]).backward()
        try:
            optimizer.step()
        except regkit.StepError as error:
            return str(error)
    return "nothing was raised"


def plan_of_the_first(folder: Path) -> str:
    """A plan that one process resolves while the others do something else."""
    net = make_net()
    fully_shard(net)
    return str(regkit.resolve(net, {"rules": L2})) if dist.get_rank() == 0 else ""


def refused_constraint(folder: Path) -> str:
    """What is raised of a constraint on a weight that its parametrization cannot bring there."""
    net = make_net(computed="spectral_norm")
    fully_shard(net)
    try:
        regkit.attach(net, {"rules": MAX_NORM}).detach()
    except regkit.AttachError as error:
        return str(error)
    return "nothing was raised"


# --- the watchdog ----------------------------------------------------------------------------------------------------

WATCHED: dict[str, tuple[str, Callable[[Net], Spread]]] = {
    "DDP": ("LSTM", ddp),
    "FSDP2": ("LSTM", fsdp),
    "FSDP2, left whole": ("LSTM", fsdp_left_whole),
    "tensor parallel": ("MatmulCell", tensor_parallel_rows),
}


def watched_quietly(folder: Path, spread: str) -> int:
    """The step count after many backward passes to each step, with evaluations between them."""
    layer, over = WATCHED[spread]
    net = make_net(layer)
    there = over(net)
    with regkit.attach(there.module, {"rules": [*L2, *MAX_NORM, *ACTIVITY]}) as attachment:
        optimizer = torch.optim.SGD(there.module.parameters(), lr=0.1)
        with torch.no_grad():
            loss_of(there, *batches()[0])
        attachment.weights_changed()  # FSDP2 has left whole parameters in the modules
        for _ in range(2):
            for x, y in 4 * batches():
                (loss_of(there, x, y) + attachment.penalty()).backward()
                with torch.no_grad():
                    loss_of(there, x, y)
            optimizer.step()
            optimizer.zero_grad()
        return attachment.step_count


UNHEARD = ("DDP", "FSDP2", "tensor parallel")


def in_place(p: Tensor) -> None:
    p -= 0.1 * p.grad


def through_data(p: Tensor) -> None:
    p.data.sub_(0.1 * p.grad)


def unheard(folder: Path, spread: str, update: Callable[[Tensor], None]) -> tuple[int, str]:
    """In which iteration with an update that no optimizer makes something is raised, and what."""
    layer, over = WATCHED[spread]
    net = make_net(layer)
    there = over(net)
    with regkit.attach(there.module, {"rules": [*L2, *MAX_NORM]}):
        for iteration, (x, y) in enumerate(4 * batches(), 1):
            there.module.zero_grad()
            try:
                loss_of(there, x, y).backward()
            except regkit.StepError as error:
                return iteration, str(error)
            with torch.no_grad():
                for p in there.module.parameters():
                    update(p)
    return 0, "nothing was raised"


def sent_by_backward_passes(folder: Path, spread: str) -> tuple[int, int]:
    """How many collective operations some backward passes take, with weights that are watched and without."""

    def sent(rules: Rules) -> int:
        layer, over = WATCHED[spread]
        there = over(make_net(layer))
        with regkit.attach(there.module, {"rules": rules}) if rules else nullcontext():
            return sum(map(sent_by, (loss_of(there, x, y) for x, y in batches(2))))

    def sent_by(loss: Tensor) -> int:
        with CommDebugMode() as communication:
            loss.backward()
        return communication.get_total_counts()

    return sent([*L2, *MAX_NORM]), sent([])


def of_size(size: int) -> dict[str, Task]:
    """The tasks of a world of so many processes, by name."""
    if size > 2:
        return {}
    fsdp1s = {f"FSDP1: {case}": partial(fsdp1, *case) for case in FSDP1_CASES}
    own = (forgotten_penalty, plan_of_the_first, refused_constraint)
    quiet = {f"watched quietly: {name}": partial(watched_quietly, spread=name) for name in WATCHED}
    sent = {f"sent by backward passes: {name}": partial(sent_by_backward_passes, spread=name) for name in WATCHED}
    told = {
        f"unheard: {name}, {update.__name__}": partial(unheard, spread=name, update=update)
        for name, update in itertools.product(UNHEARD, (in_place, through_data))
    }
    return {**fsdp1s, **{task.__name__: task for task in own}, **quiet, **sent, **told}
