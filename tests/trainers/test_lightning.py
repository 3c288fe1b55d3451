"""Weight rules in Lightning: `regkit.attach` alone, in the user's own code, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regkit
from tests.support.loops import DECAY, RULE, assert_equal_weights, loss_of
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
)

pytestmark = SILENCED

EVERY_RUN = pytest.mark.parametrize(
    "run", [pytest.param(run, marks=pytest.mark.works_with(LABELS[run])) for run in RUNS]
)


@EVERY_RUN
def test_l2_of_half_the_strength_equals_weight_decay(run, make_model, batches):
    kind, options, _ = RUNS[run]
    make, batches = prepared(run, make_model, batches)
    bare, decayed, regularized = make(), make(), make()
    fit(kind(bare), batches, **options())
    fit(kind(decayed, DECAY), batches, **options())
    attachment = regkit.attach(regularized, RULE)
    fit(kind(regularized), batches, **options())
    assert_equal_weights(decayed, regularized, 1e-7 if "mixed" in run else 1e-12)
    assert attachment.step_count == (2 if "accumulation" in run else 4)
    assert not torch.allclose(bare.rnn.weight_hh_l0, regularized.rnn.weight_hh_l0, atol=1e-3)


@EVERY_RUN
def test_max_norm_holds_after_the_run(run, make_model, batches):
    kind, options, reference = RUNS[run]
    make, batches = prepared(run, make_model, batches)
    by_projection, constrained = make(), make()

    def project() -> None:
        with torch.no_grad():
            w = by_projection.rnn.weight_hh_l0
            w.mul_((0.3 / w.norm(dim=1, keepdim=True)).clamp(max=1))

    by_hand(by_projection, batches, after=project, **reference())
    rule = {"target": {"role": "recurrent"}, "constraint": "max_norm(0.3)"}
    attachment = regkit.attach(constrained, {"rules": [rule]})
    fit(kind(constrained), batches, **options())
    assert constrained.rnn.weight_hh_l0.norm(dim=1).amax() <= 0.3 * (1 + 1e-6)
    assert attachment.violations()["rules/0"] <= 1e-6
    assert_equal_weights(by_projection, constrained, TOLERANCE[run])


@EVERY_RUN
def test_proximal_l1_is_ista_and_makes_exact_zeros(run, make_model, batches):
    kind, options, reference = RUNS[run]
    make, batches = prepared(run, make_model, batches)
    ista, proximal = make(), make()

    def shrink() -> None:
        with torch.no_grad():
            for p in ista.rnn.parameters():
                p.copy_(p.sign() * (p.abs() - 0.1 * 0.5).clamp(min=0))

    by_hand(ista, batches, after=shrink, **reference())
    regkit.attach(proximal, {"rules": [{"penalty": "l1(0.5)", "via": "proximal"}]})
    fit(kind(proximal), batches, **options())
    assert_equal_weights(ista, proximal, TOLERANCE[run])
    assert torch.equal(proximal.rnn.weight_hh_l0 == 0, ista.rnn.weight_hh_l0 == 0)
    assert (proximal.rnn.weight_hh_l0 == 0).sum() > 5


class InConfigureModel(Automatic):
    def configure_model(self) -> None:
        self.attachment = regkit.attach(self, RULE)


class OnFitStart(Automatic):
    def on_fit_start(self) -> None:
        self.attachment = regkit.attach(self, RULE)


class InConfigureOptimizers(Automatic):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        self.attachment = regkit.attach(self, RULE, optimizer=optimizer)
        return optimizer


@pytest.mark.works_with("Lightning: automatic optimization")
@pytest.mark.parametrize("kind", [InConfigureModel, OnFitStart, InConfigureOptimizers])
def test_attaching_in_any_of_the_modules_own_hooks_equals_weight_decay(kind, make_model, batches):
    decayed, regularized = make_model(), make_model()
    fit(Automatic(decayed, DECAY), batches)
    module = kind(regularized)
    fit(module, batches)
    assert_equal_weights(decayed, regularized)
    assert module.attachment.step_count == 4


@pytest.mark.works_with("Lightning: 16-mixed")
def test_a_step_skipped_under_16_mixed_counts_nothing_and_changes_nothing(make_model, batches):
    """The scale is too large for the first batch, and right from then on."""
    make, batches = prepared("16-mixed", make_model, batches)
    rules = [
        {"penalty": "l2(0.5)", "schedule": {"kind": "linear", "start": 0.0, "end": 1.0, "steps": 3}},
        {"penalty": "l1(0.1)", "via": "proximal"},
        {"target": {"role": "recurrent"}, "constraint": "max_norm(0.3)"},
    ]
    skipped, spared = make(), make()
    before = skipped.rnn.weight_hh_l0.detach().clone()
    with regkit.attach(skipped, {"rules": rules}) as attachment:
        fit(Automatic(skipped), batches[:1], **mixed(init_scale=2.0**127))
        assert attachment.step_count == 0
        assert torch.equal(skipped.rnn.weight_hh_l0, before)
        fit(Automatic(skipped), batches[1:], **mixed(init_scale=32.0))
        assert attachment.step_count == 3
    regkit.attach(spared, {"rules": rules})
    fit(Automatic(spared), batches[1:], **mixed(init_scale=32.0))
    assert_equal_weights(skipped, spared, 0.0)


class TwoOptimizers(Manual):
    """The recurrent layer and the head have an optimizer each; clipping and a second loss are done by hand."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        first, second = self.optimizers()
        for optimizer in (first, second):
            optimizer.zero_grad()
        out = self.model(batch[0])
        self.manual_backward(nn.functional.mse_loss(out, batch[1]), retain_graph=True)
        self.manual_backward(out.abs().mean())
        for optimizer in (first, second):
            self.clip_gradients(optimizer, gradient_clip_val=0.05)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.SGD(self.model.rnn.parameters(), lr=self.lr, weight_decay=self.decay),
            torch.optim.Adam(self.model.head.parameters(), lr=0.01),
        ]


@pytest.mark.works_with("Lightning: manual optimization")
def test_two_optimizers_with_two_losses_and_clipping_equal_weight_decay(make_model, batches):
    decayed, regularized = make_model(), make_model()
    fit(TwoOptimizers(decayed, DECAY), batches)
    attachment = regkit.attach(regularized, RULE)
    fit(TwoOptimizers(regularized), batches)
    assert_equal_weights(decayed, regularized)
    assert attachment.step_count == 4


@pytest.mark.works_with("Lightning: automatic optimization")
def test_an_activity_rule_without_the_callback_is_an_error_and_never_silent(make_model, batches):
    model = make_model()
    regkit.attach(model, {"rules": [{"penalty": "activity_l2(1)"}]})
    with pytest.raises(regkit.StepError, match=r"add attachment\.penalty\(\) to the loss"):
        fit(Automatic(model), batches)


@pytest.mark.works_with("Lightning: automatic optimization")
def test_the_penalty_may_be_added_by_hand_in_training_step(make_model, batches):
    class ByHand(Automatic):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + attachment.penalty()

    reference, regularized = make_model(), make_model()
    seen: list[Tensor] = []
    reference.rnn.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    by_hand(reference, batches, accumulate=2, penalty=lambda: 2.0 * seen.pop().square().mean())
    attachment = regkit.attach(regularized, {"rules": [{"penalty": "activity_l2(2)"}]})
    fit(ByHand(regularized), batches, accumulate_grad_batches=2)
    assert_equal_weights(reference, regularized)
    assert loss_of(regularized, *batches[0]) != loss_of(make_model(), *batches[0])
