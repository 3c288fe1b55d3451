"""A run that is killed and resumed is bitwise the run that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR

import regkit

pytestmark = pytest.mark.works_with("Killed and resumed: plain loops")

STEPS = 12
SPEC: dict[str, Any] = {
    "rules": [
        {
            "penalty": {"kind": "l1_l2", "l1": 0.01, "l2": 0.02},
            "schedule": {"kind": "cosine", "start": 0.0, "end": 1.0, "steps": 9},
        },
        {"target": {"role": "kernel"}, "penalty": "l1(0.02)", "via": "proximal", "schedule": "linear(1, 0.2, 7)"},
        {
            "name": "ball",
            "target": {"role": "recurrent"},
            "constraint": "max_norm(0.5)",
            "every": 3,
            "schedule": {"kind": "exponential", "decay": 0.5, "steps": 4, "limit": 0.1},
        },
        {"penalty": "activity_l2(0.5)", "schedule": {"kind": "piecewise", "boundaries": [3, 8], "values": [1, 3, 2]}},
    ]
}


class Model(nn.Module):
    """A recurrent model with dropout: its training depends on the random state."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 4, num_layers=2, dropout=0.3)
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.dropout(self.rnn(x)[0], 0.2))


def one(model: Model) -> list[Optimizer]:
    return [AdamW(model.parameters(), lr=0.02)]


def two(model: Model) -> list[Optimizer]:
    recurrent = [p for name, p in model.rnn.named_parameters() if "weight_hh" in name]
    rest = [p for p in model.parameters() if all(p is not q for q in recurrent)]
    return [SGD(recurrent, lr=0.1, momentum=0.9), Adam(rest, lr=0.02)]


OPTIMIZERS: dict[str, Callable[[Model], list[Optimizer]]] = {"one": one, "two": two}


class Run:
    """A training run as people write one: everything that it needs to go on is in its checkpoint."""

    def __init__(self, optimizers: str, spec: dict[str, Any] = SPEC) -> None:
        torch.manual_seed(0)
        self.model = Model()
        self.attachment = regkit.attach(self.model, spec)
        self.optimizers = OPTIMIZERS[optimizers](self.model)
        self.schedulers = [OneCycleLR(o, max_lr=0.1, total_steps=STEPS + 1) for o in self.optimizers]
        self.done = 0

    def parts(self) -> list[Any]:
        return [self.model, self.attachment, *self.optimizers, *self.schedulers]

    def save(self, path: Path) -> None:
        gradients = [p.grad for p in self.model.parameters()]
        states = [part.state_dict() for part in self.parts()]
        torch.save({"states": states, "grads": gradients, "rng": torch.get_rng_state(), "done": self.done}, path)

    def load(self, path: Path) -> None:
        saved = torch.load(path, weights_only=True)
        for part, state in zip(self.parts(), saved["states"], strict=True):
            part.load_state_dict(state)
        for p, grad in zip(self.model.parameters(), saved["grads"], strict=True):
            p.grad = grad
        torch.set_rng_state(saved["rng"])
        self.done = saved["done"]

    def backward(self) -> None:
        x, y = torch.randn(5, 6, 3), torch.randn(5, 6, 1)
        loss = nn.functional.mse_loss(self.model(x), y) + self.attachment.penalty()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()

    def update(self, optimizers: slice = slice(None)) -> None:
        for optimizer, scheduler in list(zip(self.optimizers, self.schedulers, strict=True))[optimizers]:
            optimizer.step()
            scheduler.step()

    def train(self, until: int) -> None:
        while self.done < until:
            self.backward()
            self.update()
            self.done += 1

    def finish(self) -> list[Tensor]:
        """Trains to the end. Returns what is left: weights, and what is optimized then."""
        self.train(STEPS)
        assert self.attachment.step_count == STEPS
        values = {**self.attachment.values(), **self.attachment.violations()}
        return [p.detach() for p in self.model.parameters()] + list(values.values())


def assert_bitwise(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("killed_at", [1, 5, 6, 7])
@pytest.mark.parametrize("optimizers", OPTIMIZERS)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(optimizers, killed_at, tmp_path):
    whole = Run(optimizers).finish()
    killed = Run(optimizers)
    killed.train(killed_at)
    killed.save(tmp_path / "checkpoint.pt")
    killed.train(killed_at + 2)  # what comes after the checkpoint is lost

    resumed = Run(optimizers)
    resumed.load(tmp_path / "checkpoint.pt")
    assert resumed.attachment.step_count == killed_at
    assert_bitwise(resumed.finish(), whole)


def test_without_the_attachments_state_a_resumed_run_is_another_one(tmp_path):
    """What makes the tests here able to fail."""
    whole = Run("one").finish()
    killed = Run("one")
    killed.train(5)
    killed.save(tmp_path / "checkpoint.pt")
    resumed = Run("one")
    start = resumed.attachment.state_dict()
    resumed.load(tmp_path / "checkpoint.pt")
    resumed.attachment.load_state_dict(start)
    resumed.train(STEPS)
    assert not torch.equal(resumed.model.rnn.weight_hh_l0, whole[1])


WEIGHTS = {"rules": SPEC["rules"][:3]}


def resumed_with_gradients(spec: dict[str, Any], stepped: int, path: Path) -> Run:
    """A run saved behind its backward pass, when so many of its two optimizers have stepped, and loaded anew."""
    killed = Run("two", spec)
    killed.train(5)
    killed.backward()
    killed.update(slice(stepped))
    killed.save(path)
    resumed = Run("two", spec)
    resumed.load(path)
    return resumed


@pytest.mark.parametrize("stepped", [0, 1])
def test_a_run_saved_with_its_gradients_in_the_middle_of_a_step_of_two_optimizers_goes_on_bitwise(stepped, tmp_path):
    resumed = resumed_with_gradients(WEIGHTS, stepped, tmp_path / "checkpoint.pt")
    resumed.update(slice(stepped, None))
    resumed.done += 1
    assert resumed.attachment.step_count == 6
    assert_bitwise(resumed.finish(), Run("two", WEIGHTS).finish())


@pytest.mark.parametrize("stepped", [0, 1])
def test_that_a_penalty_is_in_gradients_that_were_saved_cannot_be_known_and_is_not_taken_for_granted(stepped, tmp_path):
    resumed = resumed_with_gradients(SPEC, stepped, tmp_path / "checkpoint.pt")
    with pytest.raises(regkit.StepError, match="recorded nothing"):
        resumed.update(slice(stepped, None))


def accumulate(run: Run, batches: int) -> None:
    """Adds gradients, as many batches make a step."""
    for _ in range(batches):
        x, y = torch.randn(5, 6, 3), torch.randn(5, 6, 1)
        ((nn.functional.mse_loss(run.model(x), y) + run.attachment.penalty()) / 4).backward()


def test_a_run_saved_in_the_middle_of_accumulation_goes_on_bitwise(tmp_path):
    """Saved with its gradients, as an emergency checkpoint is: the activity of the batches before is in them."""
    finals = []
    for cut in (False, True):
        run = Run("one")
        for step in range(4):
            accumulate(run, 2)
            if cut and step == 2:
                run.save(tmp_path / "checkpoint.pt")
                run = Run("one")
                run.load(tmp_path / "checkpoint.pt")
            accumulate(run, 2)
            run.update()
            run.model.zero_grad()
        finals.append([p.detach() for p in run.model.parameters()])
    assert_bitwise(*finals)


CHILD = "from tests.promises import test_resume; test_resume.killed_after_step_seven()"


def killed_after_step_seven() -> None:
    """What another process does, in the folder that it was started in."""
    torch.set_num_threads(1)
    run = Run("two")
    run.train(7)
    run.save(Path("checkpoint.pt"))
    run.train(8)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_run_killed_in_one_process_and_resumed_in_another_is_bitwise_the_same(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(
        [sys.executable, "-c", CHILD], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        resumed = Run("two")
        resumed.load(tmp_path / "checkpoint.pt")
        assert_bitwise(resumed.finish(), Run("two").finish())
    finally:
        torch.set_num_threads(threads)
