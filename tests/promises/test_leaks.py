"""Nothing is left behind: not by thousands of attachments, not by models that die, not in other threads."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import threading
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim import optimizer as torch_optimizer

import regkit
from regkit.runtime.optimizer_hooks import remove_hooks

pytestmark = pytest.mark.slow

SPEC = {
    "rules": [
        {"penalty": "l2(0.01)", "schedule": "linear(0, 1, 10)"},
        {"constraint": "max_norm(0.5)"},
        {"penalty": "activity_l2(1)"},
    ]
}


def hooks_of(model: nn.Module) -> int:
    """How many hooks of any kind are on a model, its modules and its parameters."""
    modules = sum(
        len(held) for module in model.modules() for name, held in vars(module).items() if "hooks" in name and held
    )
    return modules + sum(
        len(held) for p in model.parameters() for held in (p._backward_hooks, p._post_accumulate_grad_hooks) if held
    )


def hooks_of_torch() -> int:
    """How many hooks every optimizer in the process calls."""
    return len(torch_optimizer._global_optimizer_pre_hooks) + len(torch_optimizer._global_optimizer_post_hooks)


def step(model: nn.LSTM, optimizer: Optimizer, attachment: regkit.Attachment) -> None:
    optimizer.zero_grad()
    (model(torch.ones(2, 1, 3))[0].sum() + attachment.penalty()).backward()
    optimizer.step()


def cycle(model: nn.LSTM, optimizer: Optimizer) -> None:
    with regkit.attach(model, SPEC) as attachment:
        step(model, optimizer, attachment)
        attachment.values()


@cache
def plan() -> regkit.Plan:
    return regkit.resolve(nn.LSTM(3, 4), SPEC)


def idle(model: nn.LSTM, optimizer: Optimizer) -> None:
    with regkit.attach(model, plan()):
        pass


def dropped(model: nn.LSTM, optimizer: Optimizer) -> None:
    other = nn.LSTM(3, 4)
    step(other, SGD(other.parameters(), lr=0.1), regkit.attach(other, SPEC))


def refused(model: nn.LSTM, optimizer: Optimizer) -> None:
    with regkit.attach(model, SPEC), pytest.raises(regkit.AttachError):
        regkit.attach(model, SPEC)


def copied(model: nn.LSTM, optimizer: Optimizer) -> None:
    with regkit.attach(model, SPEC):
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            [attachment] = regkit.attachments(other)
            step(other, SGD(other.parameters(), lr=0.1), attachment)
        copy.deepcopy(model)  # never trained


def failed(model: nn.LSTM, optimizer: Optimizer) -> None:
    with regkit.attach(model, SPEC):
        model(torch.ones(2, 1, 3))[0].sum().backward()
        with pytest.raises(regkit.StepError, match="not consumed"):
            optimizer.step()


class Left:
    """What there is: living objects by their type, traced bytes, open files where the system tells."""

    def __init__(self) -> None:
        gc.collect()
        self.memory, _ = tracemalloc.get_traced_memory()
        self.objects = Counter(type(one).__name__ for one in gc.get_objects())
        descriptors = Path("/proc/self/fd")
        self.files = len(list(descriptors.iterdir())) if descriptors.exists() else 0
        self.memory_with_this, _ = tracemalloc.get_traced_memory()


@pytest.fixture
def traced() -> Iterator[None]:
    """Memory is traced, and the garbage collector looks only at what comes from now on: it is much quicker."""
    gc.collect()
    remove_hooks()  # what models that are collected just now have left of the hooks
    gc.freeze()
    tracemalloc.start()
    yield
    tracemalloc.stop()
    gc.unfreeze()


def leaks(left: list[Left], times: int) -> list[str]:
    """What has grown in every round. The first makes caches, and a table may grow at any time; a leak grows in each.

    torch itself leaves up to a hundred bytes behind for each model that is made and stepped.
    """
    rounds = list(pairwise(left))
    grown = {
        name: min(after.objects[name] - before.objects[name] for before, after in rounds) for name in left[-1].objects
    }
    memory = min(after.memory - before.memory_with_this for before, after in rounds)
    found = [f"{more} of {name}" for name, more in grown.items() if more >= times / 4]
    return [*found, f"{memory} bytes"] if memory >= 200 * times else found


CYCLES = [
    pytest.param(idle, 500, marks=pytest.mark.slow),
    (idle, 100),
    (cycle, 30),
    (dropped, 30),
    (refused, 30),
    (copied, 15),
    (failed, 30),
]


@pytest.mark.works_with("Thousands of attach and detach cycles")
@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(("once", "times"), CYCLES)
def test_cycles_leave_no_hook_no_object_no_memory_and_no_file(once, times):
    model = nn.LSTM(3, 4)
    optimizer = Adam(model.parameters())
    hooks, torch_hooks = hooks_of(model), hooks_of_torch()
    left: list[Left] = []
    while len(left) < 4 or (len(left) < 10 and leaks(left, times)):
        for _ in range(times):
            once(model, optimizer)
        left.append(Left())
    assert not leaks(left, times)
    assert left[-1].files <= left[0].files
    regkit.attach(model, SPEC).detach()  # the pair of global hooks goes with the last that is detached
    assert (hooks_of(model), hooks_of_torch()) == (hooks, torch_hooks)


@pytest.mark.works_with("Thousands of attach and detach cycles")
def test_the_document_of_a_file_is_read_and_let_go(tmp_path: Path):
    path = tmp_path / "spec.json"
    regkit.load(SPEC).save(path)
    model = nn.LSTM(3, 4)
    for _ in range(200):
        with regkit.attach(model, path):
            pass
    if Path("/proc/self/fd").exists():
        open_files = {os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")}
        assert str(path) not in open_files


@pytest.mark.works_with("Threads")
def test_two_threads_attach_train_and_detach_models_of_their_own_at_once():
    def run(seed: int) -> list[Tensor]:
        """Ten attachments after one another, each for some steps, with padding of their own."""
        generator = torch.Generator().manual_seed(seed)
        model = copy.deepcopy(blank)
        for _ in range(10):
            optimizer = Adam(model.parameters(), lr=0.05)
            with regkit.attach(model, SPEC) as attachment:
                for _ in range(5):
                    x = torch.randn(4, 2, 3, generator=generator, dtype=torch.float64)
                    lengths = torch.randint(1, 5, (2,), generator=generator)
                    with attachment.lengths(lengths):
                        h, _ = model(x)
                    optimizer.zero_grad()
                    (h.square().mean() + attachment.penalty()).backward()
                    optimizer.step()
                    assert attachment.violations()["rules/1"] < 1e-9
                assert attachment.step_count == 5
        return [p.detach() for p in model.parameters()]

    blank = nn.LSTM(3, 4).double()
    alone = {seed: run(seed) for seed in range(4)}
    found: dict[int, list[Tensor]] = {}
    failures: list[BaseException] = []
    start = threading.Barrier(4)

    def work(seed: int) -> None:
        try:
            start.wait()
            found[seed] = run(seed)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for seed, weights in alone.items():
        for ours, theirs in zip(found[seed], weights, strict=True):
            assert torch.equal(ours, theirs)
    assert not torch.equal(alone[0][0], alone[1][0])


@pytest.mark.works_with("Threads")
def test_a_step_that_raises_in_one_thread_is_no_concern_of_another():
    quiet, loud = nn.LSTM(3, 4), nn.LSTM(3, 4)
    reference = copy.deepcopy(quiet)
    errors = []

    def forget() -> None:
        optimizer = SGD(loud.parameters(), lr=0.1)
        for _ in range(50):
            loud(torch.ones(2, 1, 3))[0].sum().backward()
            try:
                optimizer.step()
            except regkit.StepError as error:
                errors.append(error)

    with regkit.attach(loud, SPEC):
        thread = threading.Thread(target=forget)
        for model in (quiet, reference):
            optimizer = SGD(model.parameters(), lr=0.1)
            with regkit.attach(model, SPEC) as attachment:
                if model is quiet:
                    thread.start()
                for _ in range(50):
                    step(model, optimizer, attachment)
                if model is quiet:
                    thread.join()
                assert attachment.step_count == 50
    assert len(errors) == 50
    for ours, theirs in zip(quiet.parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours, theirs)
