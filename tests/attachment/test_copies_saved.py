"""A model with rules, saved whole and loaded in a new process, in which torch numbers its hooks from 0 again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import regkit
from tests.support.loops import assert_equal_weights, loss_of

pytestmark = pytest.mark.works_with("Copies: deepcopy, pickle, torch.save")

SPEC: dict[str, Any] = {
    "rules": [
        {"penalty": "l2(0.2)", "schedule": "linear(0, 1, 8)"},
        {"name": "ball", "constraint": "max_norm(0.4)", "every": 3},
        {"name": "ar", "penalty": "activity_l2(0.5)"},
    ]
}
KINDS = ("forward", "forward_pre", "load_state_dict_post", "state_dict_pre")
CHILD = "import sys; from tests.attachment.test_copies_saved import child; child(*sys.argv[1:])"


class Model(nn.Module):
    """A model that another process can find by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 4)
        self.head = nn.Linear(4, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


class Hook:
    """A user's hook: takes what torch gives one of its kind, writes down its name, and travels with the model."""

    def __init__(self, name: str, kind: str) -> None:
        self.name, self.kind = name, kind

    def __call__(self, *args: Any) -> None:
        assert len(args) == {"forward": 3, "forward_pre": 2, "load_state_dict_post": 2, "state_dict_pre": 3}[self.kind]
        called.add(f"{self.name}, {self.kind}")


called: set[str] = set()


def hooked(model: Model, name: str) -> None:
    for kind in KINDS:
        getattr(model.rnn, f"register_{kind}_hook")(Hook(name, kind))


def heard(model: Model, x: Tensor) -> set[str]:
    called.clear()
    with torch.no_grad():
        model(x)
    model.load_state_dict(model.state_dict())
    return set(called)


def trained(model: Model, batches: list[tuple[Tensor, Tensor]]) -> regkit.Attachment:
    (attachment,) = regkit.attachments(model)
    optimizer = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        optimizer.zero_grad()
        (loss_of(model, x, y) + attachment.penalty()).backward()
        optimizer.step()
    return attachment


def child(folder: str, asked: str) -> None:
    """Another process: loads the model, hangs hooks of its own on it, trains it, and saves what was heard."""
    torch.set_num_threads(1)
    model, batches = torch.load(Path(folder) / "model.pt", weights_only=False)
    if asked == "first":
        regkit.attachments(model)
    hooked(model, "new, before")
    first = heard(model, batches[0][0])
    attachment = trained(model, batches[2:])
    hooked(model, "new, after")
    result = {
        "heard": [first, heard(model, batches[0][0])],
        "state": model.state_dict(),
        "step_count": attachment.step_count,
        "violation": attachment.violations()["ball"],
    }
    torch.save(result, Path(folder) / "result.pt")
    attachment.detach()
    assert heard(model, batches[0][0]) == result["heard"][1]
    assert "_regkit_companions" not in vars(model)


def in_a_new_process(folder: Path, *arguments: str) -> Any:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "error", "-c", CHILD, str(folder), *arguments]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    return torch.load(folder / "result.pt", weights_only=False)


@pytest.mark.slow
@pytest.mark.parametrize("asked", ["first", "late"])
def test_a_model_loaded_in_a_new_process_goes_on_and_no_ones_hook_is_overwritten(asked, batches, tmp_path):
    """Hooks are hung on the model before and after attach, and in the new process before and after it is trained.

    Where regkit is asked for the attachment late, torch itself may let new hooks take the place of those that were hung
    after attach; regkit's own take no one's and, left behind, disturb none that come in theirs.
    """
    model = Model()
    hooked(model, "old, before")
    regkit.attach(model, SPEC)
    hooked(model, "old, after")
    trained(model, batches[:2])
    torch.save((model, batches), tmp_path / "model.pt")

    result = in_a_new_process(tmp_path, asked)
    attachment = trained(model, batches[2:])
    loaded = Model()
    loaded.load_state_dict(result["state"])
    assert_equal_weights(model, loaded, 1e-14)
    assert result["step_count"] == attachment.step_count == 4
    everyone = ("old, before", "old, after", "new, before", "new, after")
    for some, names in zip((3, 4), result["heard"], strict=True):
        wanted = {f"{name}, {kind}" for name in everyone[:some] for kind in KINDS}
        kept = wanted if asked == "first" else {name for name in wanted if "old, after" not in name}
        assert kept <= names <= wanted


@pytest.mark.slow
def test_a_model_saved_inside_detached_needs_no_regkit_to_be_loaded(tmp_path):
    model = nn.LSTM(3, 4)
    attachment = regkit.attach(model, SPEC)
    with attachment.detached():
        torch.save(model, tmp_path / "bare.pt")
    torch.save(model, tmp_path / "whole.pt")
    code = (
        "import sys, torch; sys.modules['regkit'] = None; "
        "model = torch.load(sys.argv[1], weights_only=False); model(torch.zeros(2, 1, 3))"
    )
    ended = [
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], capture_output=True, text=True, timeout=120)
        for name in ("bare.pt", "whole.pt")
    ]
    assert ended[0].returncode == 0, ended[0].stderr
    assert "regkit" in ended[1].stderr
