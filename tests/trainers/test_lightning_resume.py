"""A Lightning run that is killed and resumed from its checkpoint is bitwise equal to one that was left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn

import regkit
from regkit.integrations.lightning import RegularizationCallback
from tests.support.loops import Batches
from tests.support.models import Tagger
from tests.support.trainers.lightning_runs import SILENCED, Automatic, Manual, mixed, trainer

pytestmark = [
    pytest.mark.slow,
    *SILENCED,
    pytest.mark.works_with("Lightning: killed and resumed"),
    # What ModelCheckpoint has to say of itself.
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
]

RAMP = {"kind": "linear", "start": 0.0, "end": 1.0, "steps": 9}
RECURRENT = {"target": {"role": "recurrent"}}
WEIGHTS = [
    {"penalty": "l2(0.5)", "schedule": RAMP},
    {**RECURRENT, "penalty": "l1(0.1)", "via": "proximal", "schedule": {**RAMP, "kind": "cosine"}},
    {**RECURRENT, "constraint": "max_norm(0.4)", "every": 4, "schedule": {**RAMP, "start": 2.0}},
]
ACTIVITY = [{"penalty": "temporal(1)", "schedule": {"kind": "exponential", "start": 2.0, "decay": 0.5, "steps": 5}}]


class Decaying(Automatic):
    """Adam, and a learning rate that goes down at each step."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.model.parameters(), lr=0.02)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class ByHand(Decaying):
    """Attaches weight rules, and keeps their state in the checkpoint by its own hooks."""

    def configure_model(self) -> None:
        self.__dict__["attachment"] = regkit.attach(self, {"rules": WEIGHTS})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["regkit"] = self.attachment.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.attachment.load_state_dict(checkpoint["regkit"])


class TwoManual(Manual):
    """A recurrent layer and a head with an optimizer each, which take one step together."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(nn.functional.mse_loss(self.model(batch[0]), batch[1]))
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters(), lr=0.02) for part in (self.model.rnn, self.model.head)]


class Resumable:
    """A loader that goes on from the middle of an epoch, as Lightning asks of one."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(2)
        self.batches: Batches = [
            (torch.randn(5, 6, 3, generator=generator), torch.randn(5, 6, 2, generator=generator)) for _ in range(4)
        ]
        self.next = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.next %= len(self)
        while self.next < len(self):
            self.next += 1
            yield self.batches[self.next - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next = state["next"]


class Killed(Callback):
    """Ends the process as the kernel would, in the middle of an epoch."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 1 and batch_idx == 3:
            os.kill(os.getpid(), signal.SIGKILL)


def run(kind: str, folder: Path, *callbacks: Callback, ckpt_path: str | None = None) -> tuple[nn.Module, int]:
    """Three epochs of a run of this kind.  Returns the model, and how many steps its attachment has counted."""
    torch.manual_seed(1)
    model = Tagger(nn.GRU)
    module = {"by hand": ByHand, "two optimizers": TwoManual}.get(kind, Decaying)(model)
    extra: list[Callback] = [*callbacks, ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1)]
    if kind != "by hand":
        extra.insert(0, RegularizationCallback({"rules": WEIGHTS + ACTIVITY}))
    options = mixed(growth_interval=3) if kind == "16-mixed" else {}
    options |= {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5} if kind == "accumulation" else {}
    trainer(max_epochs=3, callbacks=extra, enable_checkpointing=True, **options).fit(
        module, Resumable(), ckpt_path=ckpt_path
    )
    attachment = module.attachment if kind == "by hand" else extra[0].attachment
    return model, attachment.step_count


KINDS = ["automatic", "accumulation", "16-mixed", "two optimizers", "by hand"]


def kill_each(folder: Path) -> None:
    """Each kind of run, in a process of its own that does not live to the end."""
    for kind in KINDS:
        child = os.fork()
        if child == 0:
            run(kind, folder / kind, Killed())
            os._exit(0)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL, kind


@pytest.fixture(scope="module")
def remains(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of runs that were killed."""
    folder = tmp_path_factory.mktemp("killed")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-m", __name__, str(folder)], env=environment, check=True)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_and_resumed_run_is_bitwise_equal_to_one_left_alone(kind, remains, tmp_path):
    last = max((remains / kind).glob("*.ckpt"), key=lambda path: int(path.stem.removeprefix("step=")))
    assert last.stem == {"accumulation": "step=2", "two optimizers": "step=14"}.get(kind, "step=6")
    alone, steps = run(kind, tmp_path / "alone")
    resumed, steps_after = run(kind, tmp_path / "resumed", ckpt_path=str(last))
    assert steps == steps_after == (6 if kind == "accumulation" else 12)
    assert all(map(torch.equal, alone.parameters(), resumed.parameters()))


def test_a_run_that_is_resumed_without_the_state_is_another_one(remains, tmp_path):
    """Or else the tests above would say nothing about the state."""
    checkpoint = torch.load(remains / "automatic" / "step=6.ckpt")
    state = checkpoint["callbacks"].pop("RegularizationCallback")
    assert state["step_count"] == 6
    torch.save(checkpoint, tmp_path / "without.ckpt")
    alone, _ = run("automatic", tmp_path / "alone")
    resumed, steps = run("automatic", tmp_path / "resumed", ckpt_path=str(tmp_path / "without.ckpt"))
    assert steps == 6
    assert not torch.allclose(alone.rnn.weight_hh_l0, resumed.rnn.weight_hh_l0, atol=1e-3)


class Judged(Decaying):
    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.model(batch[0])


def test_testing_an_old_checkpoint_does_not_turn_the_schedules_back(remains):
    callback = RegularizationCallback({"rules": WEIGHTS + ACTIVITY})
    module, lightning = Judged(Tagger(nn.GRU)), trainer(callbacks=[callback], max_epochs=2)
    lightning.fit(module, Resumable())
    lightning.test(module, Resumable(), ckpt_path=str(remains / "automatic" / "step=2.ckpt"), verbose=False)
    lightning.fit_loop.max_epochs = 3
    lightning.fit(module, Resumable())
    assert callback.attachment.step_count == 12


class Late(SingleDeviceStrategy):
    """Loads a checkpoint after the fit has started, as the strategies for sharded models do."""

    restore_checkpoint_after_setup = True


def test_a_strategy_may_load_the_checkpoint_after_the_fit_has_started(remains):
    counts: list[int] = []

    class Counting(Decaying):
        def on_train_start(self) -> None:
            counts.append(callback.attachment.step_count)

    callback = RegularizationCallback({"rules": WEIGHTS + ACTIVITY})
    lightning = trainer(callbacks=[callback], max_epochs=3, strategy=Late("cpu"))
    lightning.fit(Counting(Tagger(nn.GRU)), Resumable(), ckpt_path=str(remains / "automatic" / "step=6.ckpt"))
    assert counts == [6]
    assert callback.attachment.step_count == 12


if __name__ == "__main__":
    kill_each(Path(sys.argv[1]))
