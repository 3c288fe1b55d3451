"""The life of the Lightning callback: fits, validation, exceptions, logs; and nothing that it leaves behind."""

from __future__ import annotations

import copy
import csv
import pickle
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

import regkit
from regkit.integrations.lightning import RegularizationCallback
from tests.support.loops import Batches, assert_equal_weights, loss_of
from tests.support.trainers.lightning_activity import ACTIVITY, SPEC, watched
from tests.support.trainers.lightning_runs import SILENCED, Automatic, Manual, by_hand, fit, loader, trainer

pytestmark = [*SILENCED, pytest.mark.works_with("Lightning: RegularizationCallback")]


class Evaluated(Automatic):
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return loss_of(self.model, *batch)

    test_step = validation_step


@pytest.mark.parametrize("inference_mode", [True, False])
def test_sanity_checks_validation_and_tests_leave_the_training_as_it_is(inference_mode, make_model, batches):
    model, regularized = make_model(), make_model()
    by_hand(model, batches, penalty=watched(model), accumulate=2)
    callback = RegularizationCallback(SPEC)
    run = trainer(
        callbacks=[callback],
        accumulate_grad_batches=2,
        val_check_interval=1,  # in the midst of an accumulation, too
        num_sanity_val_steps=2,
        inference_mode=inference_mode,
    )
    module = Evaluated(regularized)
    run.validate(module, loader(batches), verbose=False)
    run.fit(module, loader(batches), loader(batches))
    run.test(module, loader(batches), verbose=False)
    assert_equal_weights(model, regularized)
    assert callback.attachment.step_count == 2


def scheduled(spec: dict[str, Any]) -> dict[str, Any]:
    ramp = {"kind": "linear", "start": 0.0, "end": 1.0, "steps": 6}
    return {"rules": [{**rule, "schedule": ramp} for rule in spec["rules"]]}


@pytest.mark.parametrize("detach", [False, True])
def test_a_second_fit_goes_on_where_the_first_one_stopped(detach, make_model, batches):
    once, twice = make_model(), make_model()
    fit(Automatic(once), batches, callbacks=[RegularizationCallback(scheduled(SPEC))], max_epochs=2)
    module, callback = Automatic(twice), RegularizationCallback(scheduled(SPEC), detach=detach)
    keep = torch.optim.SGD(twice.parameters(), lr=0.1, momentum=0.9)  # one optimizer, with one momentum, for both fits
    module.configure_optimizers = lambda: keep
    fit(module, batches, callbacks=[callback])
    first = callback.attachment
    fit(module, batches, callbacks=[callback])
    assert callback.attachment is not first
    assert callback.attachment.step_count == 8
    assert_equal_weights(once, twice)


def test_a_fit_of_another_model_begins_at_step_0_and_lets_the_first_one_go(make_model, batches):
    first, second, alone = make_model(), make_model(), make_model()
    callback = RegularizationCallback(scheduled(SPEC))
    fit(Automatic(first), batches, callbacks=[callback])
    fit(Automatic(second), batches, callbacks=[callback])
    fit(Automatic(alone), batches, callbacks=[RegularizationCallback(scheduled(SPEC))])
    assert callback.attachment.step_count == 4
    assert_equal_weights(second, alone)
    assert not first.rnn._forward_hooks


def test_after_the_fit_rules_stay_in_force_for_a_loop_of_ones_own(make_model, batches):
    model = make_model()
    callback = RegularizationCallback(ACTIVITY)
    fit(Automatic(model), batches, callbacks=[callback])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of(model, *batches[0]).backward()
    with pytest.raises(regkit.StepError, match=r"add attachment\.penalty\(\) to the loss"):
        optimizer.step()
    callback.attachment.discard()
    optimizer.zero_grad()
    (loss_of(model, *batches[0]) + callback.attachment.penalty()).backward()
    optimizer.step()
    assert callback.attachment.step_count == 5


def traces(run: Any, model: nn.Module) -> list[str]:
    """What of regkit is left on a Trainer and a model."""
    left = [name for name in ("training_step", "backward") if name in vars(run.strategy)]
    left += [name for name in vars(model) if "regkit" in name]
    return left + [str(hook) for module in model.modules() for hook in module._forward_hooks.values()]


class Failing(Automatic):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 2 and self.fail:
            raise ArithmeticError("in the midst of a fit")
        return loss

    fail = True


@pytest.mark.parametrize("fail", [False, True])
def test_with_detach_nothing_is_left_after_a_fit_however_it_ends(fail, make_model, batches):
    module, run = Failing(make_model()), trainer(callbacks=[RegularizationCallback(SPEC, detach=True)])
    module.fail = fail
    if fail:
        with pytest.raises(ArithmeticError):
            run.fit(module, loader(batches))
    else:
        run.fit(module, loader(batches))
    assert not traces(run, module)
    plain = make_model().state_dict()
    module.load_state_dict({f"model.{name}": value for name, value in plain.items()})
    by_hand(module.model, batches)
    reference = make_model()
    by_hand(reference, batches)
    assert_equal_weights(module.model, reference, 0.0)


def test_after_an_exception_the_next_fit_is_right_and_the_cut_batch_is_gone(make_model, batches):
    interrupted, reference = make_model(), make_model()
    callback, module = RegularizationCallback(ACTIVITY), Failing(interrupted)
    run = trainer(callbacks=[callback])
    with pytest.raises(ArithmeticError):
        run.fit(module, loader(batches))
    assert not {"training_step", "backward"} & set(traces(run, module))  # the rules alone stay
    assert callback.attachment.penalty() == 0  # nothing is in store
    module.fail = False
    fit(module, batches, callbacks=[callback])
    by_hand(reference, batches[:2], penalty=watched(reference, ACTIVITY))
    by_hand(reference, batches, penalty=watched(reference, ACTIVITY))
    assert_equal_weights(interrupted, reference)
    assert callback.attachment.step_count == 6


def test_a_spec_that_does_not_fit_raises_as_the_fit_starts_and_leaves_nothing(make_model, batches):
    callback = RegularizationCallback({"rules": [{"target": {"module": "decoder"}, "penalty": "l2(1)"}]})
    module, run = Automatic(make_model()), trainer(callbacks=[callback])
    with pytest.raises(regkit.ResolveError, match="decoder"):
        run.fit(module, loader(batches))
    assert not traces(run, module)
    with pytest.raises(regkit.RegkitError, match=r"attaches as Trainer\.fit starts"):
        _ = callback.attachment


def test_mistakes_are_told_when_the_callback_is_made():
    with pytest.raises(regkit.SpecError, match="l3"):
        RegularizationCallback({"rules": [{"penalty": "l3(1)"}]})
    with pytest.raises(ValueError, match="divided_by is greater than 0"):
        RegularizationCallback(SPEC, divided_by=0)


class Copying(Automatic):
    """Trains, and makes a copy of itself meanwhile, as averaging callbacks do."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            trainer, self._trainer = self._trainer, None
            self.__dict__["twin"] = copy.deepcopy(self)
            self._trainer = trainer


def test_a_copy_made_during_the_fit_is_one_of_the_module_alone(make_model, batches):
    module = Copying(make_model())
    fit(module, batches, callbacks=[RegularizationCallback(SPEC)])
    twin, reference = module.__dict__["twin"], make_model()
    for attachment in regkit.attachments(twin):  # which travels with the copy
        attachment.detach()
    trained = [p.detach().clone() for p in module.model.parameters()]
    reference.load_state_dict(twin.model.state_dict())
    fit(twin, batches)
    by_hand(reference, batches)
    assert_equal_weights(twin.model, reference)
    assert all(map(torch.equal, trained, module.model.parameters()))


def test_a_callback_may_be_pickled_before_its_first_fit_as_spawning_strategies_do(make_model, batches):
    model, regularized = make_model(), make_model()
    by_hand(model, batches, penalty=watched(model))
    callback = pickle.loads(pickle.dumps(RegularizationCallback(SPEC)))
    fit(Automatic(regularized), batches, callbacks=[callback])
    assert_equal_weights(model, regularized)


def logged(path: Path, metric: str) -> dict[int, float]:
    with next(path.rglob("metrics.csv")).open() as file:
        return {int(row["step"]): float(row[metric]) for row in csv.DictReader(file) if row.get(metric)}


@pytest.mark.parametrize("kind", [Automatic, Manual])
def test_each_rule_is_logged_where_the_trainer_logs(kind, make_model, batches, tmp_path, monkeypatch):
    taken: list[int] = []
    values = regkit.Attachment.values
    monkeypatch.setattr(regkit.Attachment, "values", lambda self: taken.append(self.step_count) or values(self))
    recurrent = {"target": {"role": "recurrent"}}
    rules = [
        *SPEC["rules"],
        {**recurrent, "penalty": "l1(1)"},
        {**recurrent, "constraint": "max_norm(0.05)", "every": 4},
    ]
    seen: dict[int, dict[str, Tensor]] = {}

    class Watching(kind):
        def on_train_batch_end(self, *_: Any) -> None:
            now = callback.attachment
            seen[now.step_count - 1] = {**values(now), **now.violations()}

    callback = RegularizationCallback({"rules": rules}, prefix="rules of")
    run = fit(
        Watching(make_model()),
        batches,
        callbacks=[callback],
        logger=CSVLogger(tmp_path),
        log_every_n_steps=2,
    )
    assert taken == [2, 4]  # nothing is computed where nothing is written
    assert set(seen[3]) == {"ar", "tar", "decay", "rules/3", "rules/4"}
    for key in seen[3]:
        written = logged(tmp_path, f"rules of/{key}")
        assert written == {step: pytest.approx(seen[step][key].item(), rel=1e-6) for step in (1, 3)}
        assert run.callback_metrics[f"rules of/{key}"] == pytest.approx(seen[3][key].item(), rel=1e-6)
    assert logged(tmp_path, "rules of/rules/4")[1] > 0.01
    assert logged(tmp_path, "rules of/rules/4")[3] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler looks at it
def test_a_compiled_module_is_trained_as_the_loop_written_by_hand(make_model, batches):
    model, regularized = make_model(), make_model()
    by_hand(model, batches, penalty=watched(model))
    callback = RegularizationCallback(SPEC)
    compiled = torch.compile(Automatic(regularized), backend="aot_eager")
    fit(compiled, batches, callbacks=[callback])
    assert_equal_weights(model, regularized)
    assert callback.attachment.step_count == 4


class Other(pytorch_lightning.LightningModule):
    """A module under Lightning's other name."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    training_step = Automatic.training_step

    def configure_optimizers(self) -> Any:
        return Automatic(self.model).configure_optimizers()


def test_the_callback_is_one_for_a_trainer_of_pytorch_lightning_as_well(make_model, batches: Batches):
    model, regularized = make_model(), make_model()
    by_hand(model, batches, penalty=watched(model))
    callback = RegularizationCallback(SPEC)
    run = pytorch_lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callback,
    )
    run.fit(Other(regularized), loader(batches))
    assert_equal_weights(model, regularized)
    assert callback.attachment.step_count == 4
