"""Activity penalties in Lightning, through the callback, equal the same losses in loops written by hand."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regkit
from regkit.integrations.lightning import RegularizationCallback
from tests.support.loops import assert_equal_weights, loss_of
from tests.support.trainers.lightning_activity import ACTIVITY, SPEC, watched
from tests.support.trainers.lightning_runs import (
    LABELS,
    RUNS,
    SILENCED,
    TOLERANCE,
    Automatic,
    Manual,
    by_hand,
    fit,
    mixed,
    prepared,
    scaler,
)

pytestmark = SILENCED


@pytest.mark.parametrize("run", [pytest.param(run, marks=pytest.mark.works_with(LABELS[run])) for run in RUNS])
def test_the_callback_equals_the_loss_written_by_hand(run, make_model, batches):
    kind, options, reference = RUNS[run]
    make, batches = prepared(run, make_model, batches)
    bare, model, regularized = make(), make(), make()
    by_hand(bare, batches, **reference())
    by_hand(model, batches, penalty=watched(model), **reference())
    callback = RegularizationCallback(SPEC)
    fit(kind(regularized), batches, callbacks=[callback], **options())
    assert_equal_weights(model, regularized, TOLERANCE[run])
    assert callback.attachment.step_count == (2 if "accumulation" in run else 4)
    assert not torch.allclose(bare.rnn.weight_hh_l0, regularized.rnn.weight_hh_l0, atol=1e-3)


@pytest.mark.works_with("Lightning: 16-mixed")
def test_a_step_skipped_under_16_mixed_takes_its_penalty_along(make_model, batches):
    make, batches = prepared("16-mixed", make_model, batches)
    model, regularized = make(), make()
    overflowing = {"init_scale": 2.0**127, "backoff_factor": 2.0**-120}
    by_hand(model, batches, penalty=watched(model), scaler=scaler(**overflowing), autocast=torch.float16)
    callback = RegularizationCallback(SPEC)
    fit(Automatic(regularized), batches, callbacks=[callback], **mixed(**overflowing))
    assert_equal_weights(model, regularized, TOLERANCE["16-mixed"])
    assert callback.attachment.step_count == 3


class WithDict(Automatic):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx), "more": batch_idx}


class Newton(Automatic):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.model.parameters(), lr=0.1, max_iter=3)


@pytest.mark.works_with("Lightning: automatic optimization")
def test_a_training_step_may_return_a_dict_and_keeps_the_loss_that_it_returned(make_model, batches):
    model, regularized = make_model(), make_model()
    by_hand(model, batches, penalty=watched(model))
    reported: list[Any] = []

    class Watching(WithDict):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            reported.append((outputs["loss"], outputs["more"]))

    first = loss_of(regularized, *batches[0]).detach()
    fit(Watching(regularized), batches, callbacks=[RegularizationCallback(SPEC)])
    assert_equal_weights(model, regularized)
    assert reported[0] == (first, 0)
    assert len(reported) == 4


@pytest.mark.works_with("Lightning: automatic optimization")
def test_every_evaluation_of_a_line_search_gets_the_penalty(make_model, batches):
    model, regularized = make_model(), make_model()
    penalty = watched(model)
    optimizer = Newton(model).configure_optimizers()
    for x, y in batches:

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            loss = loss_of(model, x, y) + penalty()
            optimizer.zero_grad()
            loss.backward()
            return loss

        optimizer.step(closure)
    fit(Newton(regularized), batches, callbacks=[RegularizationCallback(SPEC)])
    assert_equal_weights(model, regularized)


class Skipping(Automatic):
    """Skips some batches, after their forward pass."""

    skipped: tuple[int, ...] = ()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx in self.skipped else loss


@pytest.mark.works_with("Lightning: automatic optimization")
@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
@pytest.mark.parametrize(("skipped", "accumulate"), [((0, 2), 1), ((0,), 2), ((1,), 2), ((1, 2), 2)])
def test_a_batch_that_training_step_skips_leaves_nothing_behind(skipped, accumulate, make_model, batches):
    model, regularized = make_model(), make_model()
    penalty, optimizer = watched(model), Automatic(model).configure_optimizers()
    for n, (x, y) in enumerate(batches):
        if n % accumulate == 0:
            optimizer.zero_grad()
        if n not in skipped:
            ((loss_of(model, x, y) + penalty()) / accumulate).backward()
        if (n + 1) % accumulate == 0:
            optimizer.step()
    module = Skipping(regularized)
    module.skipped = skipped
    fit(module, batches, callbacks=[RegularizationCallback(SPEC)], accumulate_grad_batches=accumulate)
    assert_equal_weights(model, regularized)


class Halves(Manual):
    """Backpropagates the halves of a batch one after the other, then steps. share: of each half in the whole."""

    share = 0.5

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        for x, y in zip(*(part.chunk(2, dim=1) for part in batch), strict=True):
            self.manual_backward(loss_of(self.model, x, y) * self.share)
        optimizer.step()


@pytest.mark.works_with("Lightning: manual optimization")
@pytest.mark.parametrize("divided_by", [1, 2])
def test_several_forward_passes_in_one_manual_step_are_divided_as_their_losses_are(divided_by, make_model, batches):
    model, regularized = make_model(), make_model()
    penalty, optimizer = watched(model), Automatic(model).configure_optimizers()
    for batch in batches:
        optimizer.zero_grad()
        for x, y in zip(*(part.chunk(2, dim=1) for part in batch), strict=True):
            ((loss_of(model, x, y) + penalty()) / divided_by).backward()
        optimizer.step()
    module = Halves(regularized)
    module.share = 1 / divided_by
    fit(module, batches, callbacks=[RegularizationCallback(SPEC, divided_by=divided_by)])
    assert_equal_weights(model, regularized)


@pytest.mark.works_with("Lightning: manual optimization")
def test_several_forward_passes_in_one_manual_step_are_an_error_until_it_is_said_what_divides_them(make_model, batches):
    with pytest.raises(regkit.StepError, match=r"several forward passes .* divided_by=n"):
        fit(Halves(make_model()), batches, callbacks=[RegularizationCallback(SPEC)])


@pytest.mark.works_with("Lightning: manual optimization")
def test_a_manual_accumulation_over_batches_equals_the_loop_written_by_hand(make_model, batches):
    class Accumulating(Manual):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
            optimizer = self.optimizers()
            self.manual_backward(loss_of(self.model, *batch) / 2)
            if batch_idx % 2:
                optimizer.step()
                optimizer.zero_grad()

    model, regularized = make_model(), make_model()
    by_hand(model, batches, accumulate=2, penalty=watched(model))
    fit(Accumulating(regularized), batches, callbacks=[RegularizationCallback(SPEC, divided_by=2)])
    assert_equal_weights(model, regularized)


class TwoLosses(Manual):
    """Two backward passes of one forward pass, then two optimizers; next, a forward pass for the head's alone."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        first, second = self.optimizers()
        out = self.model(batch[0])
        self.manual_backward(nn.functional.mse_loss(out, batch[1]), retain_graph=True)
        self.manual_backward(out.abs().mean())
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()
        self.manual_backward(loss_of(self.model, *batch))
        second.step()
        for optimizer in (first, second):
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.SGD(self.model.rnn.parameters(), lr=self.lr),
            torch.optim.Adam(self.model.head.parameters(), lr=0.01),
        ]


@pytest.mark.works_with("Lightning: manual optimization")
def test_several_losses_and_optimizers_equal_the_loop_written_by_hand(make_model, batches):
    model, regularized = make_model(), make_model()
    penalty, (first, second) = watched(model, ACTIVITY), TwoLosses(model).configure_optimizers()
    for x, y in batches:
        out = model(x)
        (nn.functional.mse_loss(out, y) + penalty() + out.abs().mean()).backward()
        first.step()
        second.step()
        model.zero_grad()
        (loss_of(model, x, y) + penalty()).backward()
        second.step()
        model.zero_grad()
    fit(TwoLosses(regularized), batches, callbacks=[RegularizationCallback(ACTIVITY)])
    assert_equal_weights(model, regularized)


@pytest.mark.works_with("Lightning: manual optimization")
def test_a_backward_pass_that_goes_past_lightning_is_an_error_and_never_silent(make_model, batches):
    class Past(Manual):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            loss_of(self.model, *batch).backward()
            optimizer.step()

    with pytest.raises(regkit.StepError, match=r"add attachment\.penalty\(\) to the loss"):
        fit(Past(make_model()), batches, callbacks=[RegularizationCallback(SPEC)])


@pytest.mark.works_with("Lightning: manual optimization")
def test_a_loss_of_many_numbers_has_no_place_for_the_penalty(make_model, batches):
    class Many(Manual):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
            out = self.model(batch[0])
            self.manual_backward(out, gradient=torch.ones_like(out))

    with pytest.raises(regkit.StepError, match=r"no place in a loss of \(5, 6, 2\)"):
        fit(Many(make_model()), batches, callbacks=[RegularizationCallback(SPEC)])


DOOR = "regkit.integrations.lightning"


def installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """As if these packages alone were installed, and the integration not imported yet."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found(name) if name in names else None)
    monkeypatch.delitem(sys.modules, DOOR)


def test_without_lightning_the_error_says_what_to_install(monkeypatch):
    installed(monkeypatch)
    with pytest.raises(ImportError, match="needs pip install lightning"):
        importlib.import_module(DOOR)


@pytest.mark.parametrize("name", ["lightning", "pytorch_lightning"])
def test_either_of_lightnings_two_names_is_enough(name, monkeypatch):
    installed(monkeypatch, name)
    bases = importlib.import_module(DOOR).RegularizationCallback.__mro__
    assert {base.__module__.split(".")[0] for base in bases} == {"regkit", name, "builtins"}
