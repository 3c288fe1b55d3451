"""Mixed and half precision: penalties are taken in float32, and a step that is skipped counts nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import regkit
from tests.support.cells import AR_TAR, Looped, Sequenced, ar_tar, make
from tests.support.loops import assert_equal_weights, rnn_groups

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
KINDS = pytest.mark.parametrize("kind", [Looped, Sequenced])
SPEC = {
    "rules": [
        *AR_TAR["rules"],
        {"name": "l2", "penalty": "l2(0.05)"},
        {"name": "l1", "penalty": "l1(0.01)", "via": "loss"},
        {"name": "ball", "target": {"role": "recurrent"}, "constraint": "max_norm(0.6)"},
    ]
}
FUSED = pytest.mark.parametrize("fused", [False, True])


def single(kind: type[nn.Module]) -> nn.Module:
    """Of plain RNNs: under autocast they put out half precision on every CPU."""
    return make(kind, nn.RNNCell if kind is Looped else nn.RNN).float()


def recurrent(model: nn.Module) -> nn.Parameter:
    return model.rnn.weight_hh if isinstance(model, Looped) else model.rnn.weight_hh_l0


@pytest.fixture
def batches(batches: list) -> list[tuple[Tensor, Tensor]]:
    return [(x.float(), y.float()) for x, y in batches]


# --- autocast --------------------------------------------------------------------------------------------------------


def train_by_hand(
    model: nn.Module,
    batches: list,
    dtype: torch.dtype,
    scaler: torch.amp.GradScaler,
    fused: bool,
    penalized: float = 1.0,
) -> None:
    """Penalties of what autocast made, in float32, in a loop without regkit."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    for x, y in batches:
        with torch.autocast("cpu", dtype):
            h = model.outputs(x)
            loss = nn.functional.mse_loss(model.head(h).float(), y)
        wide = h.float()
        l2 = 0.05 * sum(p.square().sum() for p in model.rnn.parameters())
        l1 = 0.01 * sum(p.abs().sum() for p in model.rnn.parameters())
        optimizer.zero_grad()
        scaler.scale(loss + penalized * (ar_tar(wide) + l2 + l1)).backward()
        scaler.step(optimizer)
        scaler.update()
        with torch.no_grad():
            w = recurrent(model)
            w.mul_((0.6 / w.norm(dim=1, keepdim=True)).clamp(max=1))


@HALVES
@KINDS
@FUSED
@pytest.mark.works_with("AMP: autocast and GradScaler")
@pytest.mark.parametrize("inside", [False, True])
def test_training_under_autocast_equals_a_loop_with_its_penalties_in_float32(inside, fused, kind, dtype, batches):
    by_hand, model = single(kind), single(kind)
    train_by_hand(by_hand, batches, dtype, torch.amp.GradScaler("cpu", init_scale=256.0), fused)
    attachment = regkit.attach(model, SPEC)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for x, y in batches:
        with torch.autocast("cpu", dtype):
            loss = nn.functional.mse_loss(model(x).float(), y)
            if inside:
                penalty = attachment.penalty()
        if not inside:
            penalty = attachment.penalty()
        assert penalty.dtype == torch.float32
        optimizer.zero_grad()
        scaler.scale(loss + penalty).backward()
        scaler.step(optimizer)
        scaler.update()
    # Gradients of several terms meet at h in half precision, rounded in another order there than here.
    assert_equal_weights(by_hand, model, 0.05 * torch.finfo(dtype).eps)
    bare = single(kind)
    train_by_hand(bare, batches, dtype, torch.amp.GradScaler("cpu"), fused, penalized=0.9)
    with pytest.raises(AssertionError):  # a tenth of the penalties is well within sight
        assert_equal_weights(bare, model, 0.05 * torch.finfo(dtype).eps)


@HALVES
@KINDS
@pytest.mark.works_with("AMP: autocast and GradScaler")
def test_what_is_told_under_autocast_is_what_is_told_without(kind, dtype, batches):
    model = single(kind)
    product = {"target": {"role": "recurrent"}, "penalty": "orthogonal(0.1)", "via": "loss"}
    attachment = regkit.attach(model, {"rules": [*SPEC["rules"], product]})
    with torch.autocast("cpu", dtype):
        h = model.outputs(batches[0][0])
        assert h.dtype == dtype  # or the test would test nothing
        within = attachment.values(), attachment.violations()
    without = attachment.values(), attachment.violations()
    sums = torch.stack([within[0][key] for key in ("ar", "tar", "l1", "rules/5")]).sum()
    with torch.autocast("cpu", dtype):
        torch.testing.assert_close(attachment.penalty().detach(), sums)
    torch.testing.assert_close(within, without, rtol=0, atol=0)
    expected = 2.0 * h.float().square().mean()
    torch.testing.assert_close(within[0]["ar"], expected.detach())
    assert all(value.dtype == torch.float32 for told in within for value in told.values())


@HALVES
@pytest.mark.works_with("AMP: autocast and GradScaler")
def test_steps_under_autocast_add_the_gradients_and_projections_of_float32(dtype):
    """A loop may hold autocast around the optimizer's step as well."""
    trained = []
    for enabled in (False, True):
        model = single(Sequenced)
        rules = [
            {"target": {"role": "recurrent"}, "penalty": "orthogonal(0.1)"},
            {"target": {"role": "kernel"}, "penalty": "cosine_orthogonal(0.1)"},
            {"target": {"role": "recurrent"}, "constraint": "max_norm(0.5, per=matrix)"},
        ]
        regkit.attach(model, {"rules": rules})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        with torch.autocast("cpu", dtype, enabled=enabled):
            optimizer.step()
        trained.append(model)
    assert_equal_weights(*trained, tolerance=0)


# --- half precision parameters ---------------------------------------------------------------------------------------


@HALVES
@KINDS
@pytest.mark.works_with("AMP: float16 and bfloat16 parameters")
def test_a_model_in_half_precision_trains_as_weight_decay_and_a_penalty_by_hand_would_train_it(kind, dtype, batches):
    by_hand, model = single(kind).to(dtype), single(kind).to(dtype)
    spec = {"rules": [*AR_TAR["rules"], {"penalty": "l2(0.05)"}]}
    attachment = regkit.attach(model, spec)
    penalties: dict[nn.Module, Callable[[Tensor], Tensor]] = {
        by_hand: lambda h: ar_tar(h.float()),
        model: lambda h: attachment.penalty(),
    }
    for one, penalty in penalties.items():
        optimizer = torch.optim.SGD(rnn_groups(one, 0.1 if one is by_hand else 0.0), lr=0.1)
        for x, y in batches:
            h = one.outputs(x.to(dtype))
            loss = nn.functional.mse_loss(one.head(h).float(), y) + penalty(h)
            assert loss.dtype == torch.float32
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert all(p.dtype == dtype for p in model.parameters())
    assert_equal_weights(by_hand, model, 4 * torch.finfo(dtype).eps)


@HALVES
@pytest.mark.works_with("AMP: float16 and bfloat16 parameters")
@pytest.mark.parametrize("constraint", ["max_norm(0.3)", "unit_norm", "min_max_norm(0.5, 0.7)", "non_negative"])
def test_half_precision_weights_are_projected_as_far_as_their_numbers_go(constraint, dtype):
    """The norm of 512 squares below 2^-14 would come to nothing in float16."""
    model = nn.GRU(512, 4).to(dtype)
    with torch.no_grad():
        model.weight_ih_l0.normal_(std=0.005)
        model.weight_hh_l0.normal_(std=3.0)
    attachment = regkit.attach(model, {"rules": [{"name": "set", "constraint": constraint}]})
    wide = nn.GRU(512, 4).double()
    wide.load_state_dict(model.state_dict())
    exact = regkit.attach(wide, {"rules": [{"constraint": constraint}]})
    for one in (attachment, exact):
        one.apply_constraints()
    for ours, theirs in zip(model.parameters(), wide.parameters(), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
    assert attachment.violations()["set"] <= 2 * torch.finfo(dtype).eps


@HALVES
@pytest.mark.works_with("AMP: float16 and bfloat16 parameters")
def test_penalties_of_half_precision_weights_are_told_and_taken_in_float32(dtype):
    """16 · 4096 squares of 4: in float16 the sum would be infinite, in bfloat16 it would stop growing."""
    model = nn.RNN(4096, 16).to(dtype)
    with torch.no_grad():
        model.weight_ih_l0.fill_(4.0)
    rule = {"name": "l2", "target": {"role": "kernel"}, "penalty": "l2(1)"}
    with regkit.attach(model, {"rules": [rule]}) as attachment:
        assert attachment.values()["l2"] == 16 * 4096 * 16.0
    with regkit.attach(model, {"rules": [{**rule, "via": "loss"}]}) as attachment:
        penalty = attachment.penalty()
        assert (penalty.dtype, penalty.item()) == (torch.float32, 16 * 4096 * 16.0)
        (penalty / 1024).backward()
        torch.testing.assert_close(model.weight_ih_l0.grad, model.weight_ih_l0.detach() / 512)


@HALVES
@pytest.mark.works_with("AMP: float16 and bfloat16 parameters")
def test_proximal_l1_of_half_precision_weights_makes_exact_zeros(dtype, batches):
    model = single(Sequenced).to(dtype)
    attachment = regkit.attach(model, {"rules": [{"name": "l1", "penalty": "l1(0.5)", "via": "proximal"}]})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.rnn.weight_hh_l0.detach().clone()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    wanted = before.sign() * (before.abs().float() - 0.05).clamp(min=0).to(dtype)
    torch.testing.assert_close(model.rnn.weight_hh_l0.detach(), wanted)
    assert (model.rnn.weight_hh_l0 == 0).sum() == (before.abs() <= 0.05).sum() > 0
    assert attachment.values()["l1"].dtype == torch.float32


# --- steps that are skipped ------------------------------------------------------------------------------------------


@FUSED
@KINDS
@pytest.mark.works_with("AMP: autocast and GradScaler")
def test_a_run_with_skipped_steps_equals_one_that_never_saw_those_batches(kind, fused, batches):
    """Every rule, its schedule too: a batch that overflows leaves no trace, in weights, counts or what is recorded."""
    ramp = {"kind": "linear", "start": 0.0, "end": 1.0, "steps": 6}
    spec = {"rules": [{**rule, "schedule": ramp} if "penalty" in rule else rule for rule in SPEC["rules"]]}
    trained = []
    for overflows in (False, True):
        model = single(kind)
        attachment = regkit.attach(model, spec)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, backoff_factor=1.0 - 1e-9)

        def step(
            x: Tensor,
            y: Tensor,
            times: float,
            model: nn.Module = model,
            attachment: regkit.Attachment = attachment,
            optimizer: torch.optim.Optimizer = optimizer,
            scaler: torch.amp.GradScaler = scaler,
        ) -> None:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y) + attachment.penalty()
            scaler.scale(loss * times).backward()
            scaler.step(optimizer)
            scaler.update()

        for count, (x, y) in enumerate(batches):
            if overflows:
                before = [p.detach().clone() for p in model.parameters()]
                step(x, y, 1e38)
                assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
                assert attachment.step_count == count
            step(x, y, 1.0)
        assert attachment.step_count == len(batches)
        trained.append(model)
    assert_equal_weights(*trained, tolerance=1e-7)


@FUSED
@pytest.mark.works_with("AMP: autocast and GradScaler")
def test_a_skipped_step_projects_nothing(fused, batches):
    model = single(Sequenced)
    with torch.no_grad():
        model.rnn.weight_hh_l0.mul_(5)
    attachment = regkit.attach(model, {"rules": [{"name": "ball", "constraint": "max_norm(0.6)"}]})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    outside = attachment.violations()["ball"]
    for times, wanted in ((torch.inf, outside), (1.0, 0.0)):
        optimizer.zero_grad()
        scaler.scale(model(batches[0][0]).square().mean() * times).backward()
        scaler.step(optimizer)
        scaler.update()
        torch.testing.assert_close(attachment.violations()["ball"], torch.as_tensor(wanted), rtol=0, atol=1e-6)
    assert outside > 0.1
    assert attachment.step_count == 1
