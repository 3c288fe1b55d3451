"""Hugging Face Accelerate needs no integration: `attach`, `penalty()` and the attachment's state are all it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.utils.data import DataLoader

import regkit
from tests.support.loops import DECAY, OPTIMIZERS, RULE, Batches, assert_equal_weights, loss_of, rnn_groups

CLIP = 0.01
ACTIVITY = {"rules": [{"penalty": "activity_l2(2.0)"}, {"penalty": "temporal(1.0)"}]}
ACCUMULATED = pytest.mark.parametrize("accumulation", [1, 3])  # the last of 4 batches is a step of its own


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its settings for the whole process."""

    def reset() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    reset()
    yield
    reset()


MakeFor = Callable[[nn.Module], torch.optim.Optimizer]


class ScalingAccelerator(Accelerator):
    """Accelerate's own fp16: autocast and a GradScaler. On a CPU it would leave both out and train in float32."""

    def __init__(self, **options: Any) -> None:
        super().__init__(cpu=True, mixed_precision="fp16", **options)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        self.native_amp = True


def train(
    accelerator: Accelerator,
    model: nn.Module,
    make: MakeFor,
    batches: Batches,
    attachment: regkit.Attachment | None = None,
    spec: dict[str, Any] | None = None,
) -> regkit.Attachment | None:
    """A loop as Accelerate's documentation writes it; with a spec, attached to what `prepare` has made."""
    optimizer = make(model)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    model, optimizer, schedule, loader = accelerator.prepare(
        model, optimizer, schedule, DataLoader(batches, batch_size=None)
    )
    attachment = attachment if spec is None else regkit.attach(model, spec)
    for x, y in loader:
        with accelerator.accumulate(model):
            loss = loss_of(model, x, y)
            accelerator.backward(loss if attachment is None else loss + attachment.penalty())
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return attachment


def train_by_hand(
    model: nn.Module,
    make: MakeFor,
    batches: Batches,
    accumulation: int,
    penalty: Callable[[nn.Module, Tensor], Tensor],
    scaled: bool = False,
) -> None:
    """The same without any library; scaled: in float16, with a GradScaler."""
    optimizer = make(model)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
    for start in range(0, len(batches), accumulation):
        optimizer.zero_grad()
        for x, y in batches[start : start + accumulation]:
            with torch.autocast("cpu", torch.float16, enabled=scaled):
                h = model.rnn(x)[0]
                out = model.head(h).to(y.dtype)
            loss = nn.functional.mse_loss(out, y) + penalty(model, h)
            scaler.scale(loss / accumulation).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()


def of_activity(model: nn.Module, h: Tensor) -> Tensor:
    """ACTIVITY by hand.  h: (time, batch, units)."""
    return 2.0 * h.square().mean() + (h[1:] - h[:-1]).square().mean()


@pytest.mark.works_with("Accelerate: weights")
@ACCUMULATED
@pytest.mark.parametrize("attached", ["before prepare", "after prepare"])
@pytest.mark.parametrize("name", ["SGD foreach", "Adam fused", "Adam foreach"])
def test_l2_equals_weight_decay_under_accumulation_and_clipping(name, attached, accumulation, make_model, batches):
    def make(decay: float) -> MakeFor:
        return lambda model: OPTIMIZERS[name](rnn_groups(model, decay))

    decayed, regularized = make_model(), make_model()
    train(Accelerator(cpu=True, gradient_accumulation_steps=accumulation), decayed, make(DECAY), batches)
    before = regkit.attach(regularized, RULE) if attached == "before prepare" else None
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    spec = None if before else RULE
    attachment = train(accelerator, regularized, make(0.0), batches, before, spec)
    assert_equal_weights(decayed, regularized)
    assert attachment.step_count == {1: 4, 3: 2}[accumulation]


@pytest.mark.works_with("Accelerate: weights")
@pytest.mark.parametrize("fused", [False, True])
def test_decoupled_l2_equals_adamw_with_a_scheduled_learning_rate(fused, make_model, batches):
    def make(decay: float) -> MakeFor:
        return lambda model: torch.optim.AdamW(rnn_groups(model, decay), lr=0.1, fused=fused)

    decayed, regularized = make_model(), make_model()
    train(Accelerator(cpu=True, gradient_accumulation_steps=2), decayed, make(DECAY), batches)
    spec = {"rules": [{"penalty": "l2(0.05)", "via": "decoupled"}]}
    train(Accelerator(cpu=True, gradient_accumulation_steps=2), regularized, make(0.0), batches, spec=spec)
    assert_equal_weights(decayed, regularized)


@pytest.mark.works_with("Accelerate: weights")
def test_a_step_that_accelerate_leaves_out_while_accumulating_changes_and_counts_nothing(make_model, batches):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = make_model()
    spec = {"rules": [{"penalty": "l2(0.05)"}, {"target": {"role": "recurrent"}, "constraint": "max_norm(0.3)"}]}
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    attachment = regkit.attach(model, spec)
    start = model.rnn.weight_hh_l0.detach().clone()
    assert float(attachment.violations()["rules/1"]) > 0.1
    for count, (x, y) in zip([0, 1, 1, 2], batches, strict=True):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, x, y))
            gradient = model.rnn.weight_hh_l0.grad.clone()
            optimizer.step()
            assert attachment.step_count == count
            if count == 0:
                assert torch.equal(model.rnn.weight_hh_l0, start)
            if not accelerator.sync_gradients:
                assert torch.equal(model.rnn.weight_hh_l0.grad, gradient)
            else:
                assert float(attachment.violations()["rules/1"]) < 1e-12
            optimizer.zero_grad()


@pytest.mark.works_with("Accelerate: activity penalties")
@ACCUMULATED
def test_activity_penalties_equal_those_of_a_loop_by_hand(accumulation, make_model, batches):
    def make(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), lr=0.01)

    by_hand, regularized = make_model(), make_model()
    train_by_hand(by_hand, make, batches, accumulation, of_activity)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    train(accelerator, regularized, make, batches, spec=ACTIVITY)
    assert_equal_weights(by_hand, regularized)


@pytest.mark.works_with("Accelerate: weights")
def test_under_bf16_autocast_l2_equals_weight_decay_and_max_norm_holds(make_model, batches):
    def make(decay: float) -> MakeFor:
        return lambda model: torch.optim.Adam(rnn_groups(model, decay), lr=0.01)

    def accelerator() -> Accelerator:
        return Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)

    narrow = [(x.float(), y.float()) for x, y in batches]
    decayed, regularized, bounded = (make_model().float() for _ in range(3))
    train(accelerator(), decayed, make(DECAY), narrow)
    train(accelerator(), regularized, make(0.0), narrow, spec=RULE)
    assert_equal_weights(decayed, regularized, 1e-6)
    attachment = train(accelerator(), bounded, make(0.0), narrow, spec={"rules": [{"constraint": "max_norm(0.3)"}]})
    assert attachment.violations()["rules/0"] < 1e-6


@pytest.mark.works_with("Accelerate: GradScaler")
@ACCUMULATED
@pytest.mark.parametrize("name", ["Adam fused", "SGD foreach"])
def test_in_fp16_with_a_grad_scaler_l2_equals_weight_decay(name, accumulation, make_model, batches):
    """A GRU: float16 LSTMs do not run on every CPU."""

    def make(decay: float) -> MakeFor:
        return lambda model: OPTIMIZERS[name](rnn_groups(model, decay))

    narrow = [(x.float(), y.float()) for x, y in batches]
    decayed, regularized = make_model(nn.GRU).float(), make_model(nn.GRU).float()
    train(ScalingAccelerator(gradient_accumulation_steps=accumulation), decayed, make(DECAY), narrow)
    accelerator = ScalingAccelerator(gradient_accumulation_steps=accumulation)
    attachment = train(accelerator, regularized, make(0.0), narrow, spec=RULE)
    assert_equal_weights(decayed, regularized, 1e-6)
    assert attachment.step_count == {1: 4, 3: 2}[accumulation]


@pytest.mark.works_with("Accelerate: GradScaler")
@ACCUMULATED
def test_in_fp16_with_a_grad_scaler_activity_penalties_equal_those_by_hand(accumulation, make_model, batches):
    def make(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=5.0)

    narrow = [(x.float(), y.float()) for x, y in batches]
    by_hand, regularized, bare = (make_model(nn.GRU).float() for _ in range(3))
    train_by_hand(by_hand, make, narrow, accumulation, of_activity, scaled=True)
    train_by_hand(bare, make, narrow, accumulation, lambda *_: torch.zeros(()), scaled=True)
    accelerator = ScalingAccelerator(gradient_accumulation_steps=accumulation)
    train(accelerator, regularized, make, narrow, spec=ACTIVITY)
    assert_equal_weights(by_hand, regularized, 1e-6)
    assert not torch.allclose(bare.rnn.weight_hh_l0, regularized.rnn.weight_hh_l0, atol=1e-3)


@pytest.mark.works_with("Accelerate: GradScaler")
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_changes_and_counts_nothing(fused, make_model, batches):
    accelerator = ScalingAccelerator()
    model = make_model(nn.GRU).float()
    spec = {"rules": [{"penalty": "l2(0.05)"}, {"constraint": "max_norm(0.3)"}]}
    model, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters(), fused=fused))
    attachment = regkit.attach(model, spec)
    before = [p.detach().clone() for p in model.parameters()]
    for overflows, (x, y) in zip([True, False], batches, strict=False):
        accelerator.backward(loss_of(model, x.float(), y.float()) * (torch.inf if overflows else 1.0))
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.step_was_skipped is (overflows and not fused)  # Accelerate does not see a fused one skip
        assert attachment.step_count == (not overflows)
        assert overflows is all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert attachment.violations()["rules/1"] < 1e-6


@pytest.mark.works_with("Accelerate: killed and resumed")
def test_a_run_resumed_from_save_state_is_bitwise_the_uninterrupted_one(make_model, batches, tmp_path):
    rising = {"kind": "linear", "start": 0.0, "end": 1.0, "steps": 4}
    spec = {
        "rules": [
            {"penalty": "l1(0.1)", "schedule": rising},
            {"penalty": "activity_l2(2.0)", "schedule": rising},
            {"constraint": "max_norm(0.9)", "schedule": {**rising, "start": 1.0, "end": 0.3}},
        ]
    }

    def run(epochs: range, load: Path | None = None, save: Path | None = None) -> tuple[nn.Module, regkit.Attachment]:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = make_model(num_layers=2, dropout=0.4)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        model, optimizer, schedule, loader = accelerator.prepare(
            model, optimizer, schedule, DataLoader(batches, batch_size=None)
        )
        attachment = regkit.attach(model, spec)
        accelerator.register_for_checkpointing(attachment)
        if load is not None:
            torch.rand(5)
            accelerator.load_state(str(load))
        for _ in epochs:
            for x, y in loader:
                with accelerator.accumulate(model):
                    accelerator.backward(loss_of(model, x, y) + attachment.penalty())
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
        if save is not None:
            accelerator.save_state(str(save))
        return model, attachment

    whole, _ = run(range(2))
    run(range(1), save=tmp_path / "state")
    again, attachment = run(range(1, 2), load=tmp_path / "state")
    assert attachment.step_count == 4
    for (name, ours), theirs in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
