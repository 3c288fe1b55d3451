"""A run of Transformers' Trainer that was killed and resumed is bitwise the run that was not, schedules included."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

import regkit
from regkit.integrations.transformers import RegularizationCallback, RegularizedTrainer
from tests.support.trainers.text_trainer import TextModel, make_text_model, trained

pytestmark = [pytest.mark.slow, pytest.mark.works_with("Transformers: killed and resumed")]
RISING = {"kind": "linear", "start": 0.0, "end": 1.0, "steps": 6}
FALLING = {"kind": "linear", "start": 1.0, "end": 0.25, "steps": 6}
SCHEDULED = [
    {"target": {"role": "recurrent"}, "penalty": "l1_l2(l1=0.05, l2=0.5)", "schedule": RISING},
    {"target": {"role": "recurrent"}, "penalty": "l1(0.5)", "via": "proximal", "schedule": RISING},
    {"target": {"role": "kernel"}, "constraint": "max_norm(1.0)", "schedule": FALLING},
]
SPEC = {"rules": [*SCHEDULED, {"penalty": "temporal(5.0)", "schedule": RISING}]}
OPTIONS: dict[str, Any] = {
    "gradient_accumulation_steps": 3,  # 2 steps in each epoch, the second of one batch
    "num_train_epochs": 3,
    "train_sampling_strategy": "random",
    "save_strategy": "steps",
    "save_steps": 1,
}
KILLED_AT = 4
CHECKPOINT = "checkpoint-3"


class Interrupt(TrainerCallback):
    """Ends a run in the middle: in this process with an exception, in one of its own without any leave."""

    def __init__(self, for_good: bool = False) -> None:
        self.for_good = for_good

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == KILLED_AT:
            if self.for_good:
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyboardInterrupt


def dropping_model() -> TextModel:
    return make_text_model(dropout=0.3)


def assert_bitwise_equal(one: TextModel, other: TextModel) -> None:
    for (name, ours), theirs in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def resumed(folder: Path, trainer: type[Trainer] = Trainer, **options: Any) -> tuple[TextModel, Trainer]:
    """A new model in a new Trainer, from a checkpoint: that before the kill, or another."""
    checkpoint = str(folder / options.pop("checkpoint", CHECKPOINT))
    model = dropping_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.123)  # whatever it was made with, the checkpoint has the weights
    return model, trained(model, folder, trainer, resume_from_checkpoint=checkpoint, **OPTIONS, **options)


def interrupted(folder: Path, trainer: type[Trainer] = Trainer, **options: Any) -> None:
    callbacks = [*options.pop("callbacks", []), Interrupt()]
    with pytest.raises(KeyboardInterrupt):
        trained(dropping_model(), folder, trainer, callbacks=callbacks, **OPTIONS, **options)
    assert (folder / CHECKPOINT).is_dir()


@pytest.mark.parametrize("restore", [False, True])
def test_an_interrupted_and_resumed_run_is_bitwise_the_uninterrupted_one(restore, tmp_path):
    whole = dropping_model()
    trainer = trained(whole, tmp_path / "whole", RegularizedTrainer, spec=SPEC, **OPTIONS)
    assert trainer.attachment.step_count == 6
    interrupted(tmp_path / "parts", RegularizedTrainer, spec=SPEC)
    again, trainer = resumed(
        tmp_path / "parts", RegularizedTrainer, spec=SPEC, restore_callback_states_from_checkpoint=restore
    )
    assert_bitwise_equal(whole, again)
    assert trainer.attachment.step_count == trainer.state.global_step == 6


def test_a_process_killed_in_the_middle_of_training_can_be_resumed_bitwise(tmp_path):
    whole = dropping_model()
    trained(whole, tmp_path / "whole", RegularizedTrainer, spec=SPEC, **OPTIONS)
    program = "import sys; from tests.trainers.test_transformers_resume import be_killed; be_killed(sys.argv[1])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path / "parts")], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    again, _ = resumed(tmp_path / "parts", RegularizedTrainer, spec=SPEC)
    assert_bitwise_equal(whole, again)


def be_killed(folder: str) -> None:
    trained(
        dropping_model(), Path(folder), RegularizedTrainer, spec=SPEC, callbacks=[Interrupt(for_good=True)], **OPTIONS
    )


def test_weight_rules_resume_with_the_callback_alone_in_a_plain_trainer(tmp_path):
    spec = {"rules": SCHEDULED}
    whole = dropping_model()
    trained(whole, tmp_path / "whole", callbacks=[RegularizationCallback(spec)], **OPTIONS)
    interrupted(tmp_path / "parts", callbacks=[RegularizationCallback(spec)])
    callback = RegularizationCallback(spec)
    again, _ = resumed(tmp_path / "parts", callbacks=[callback])
    assert_bitwise_equal(whole, again)
    assert callback.attachment.step_count == 6


@pytest.mark.parametrize("scheduled", [False, True])
def test_attach_alone_resumes_where_nothing_is_scheduled_or_the_state_is_kept_by_hand(scheduled, tmp_path):
    spec = {"rules": SCHEDULED if scheduled else [{**rule, "schedule": None} for rule in SCHEDULED]}
    whole = dropping_model()
    regkit.attach(whole, spec)
    trained(whole, tmp_path / "whole", **OPTIONS)

    model = dropping_model()
    attachment = regkit.attach(model, spec)
    kept: dict[int, dict[str, Any]] = {}

    class Keep(Interrupt):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            kept[state.global_step] = attachment.state_dict()
            super().on_step_end(args, state, control, **kwargs)

    with pytest.raises(KeyboardInterrupt):
        trained(model, tmp_path / "parts", callbacks=[Keep()], **OPTIONS)

    again = dropping_model()
    attachment = regkit.attach(again, spec)
    if scheduled:
        attachment.load_state_dict(kept[3])
    checkpoint = str(tmp_path / "parts" / CHECKPOINT)
    trained(again, tmp_path / "parts", resume_from_checkpoint=checkpoint, **OPTIONS)
    assert_bitwise_equal(whole, again)


def test_a_checkpoint_of_an_unregularized_run_is_one_to_start_from(tmp_path):
    interrupted(tmp_path)
    _, trainer = resumed(tmp_path, RegularizedTrainer, spec=SPEC)
    assert trainer.state.global_step == 6
    assert trainer.attachment.step_count == 3  # since attach
    _, trainer = resumed(tmp_path, RegularizedTrainer, spec=SPEC, checkpoint="checkpoint-5")
    assert trainer.attachment.step_count == 3  # of which 2 were in the checkpoint
