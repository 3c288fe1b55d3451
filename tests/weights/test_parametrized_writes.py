"""Constraints, proximal and decoupled rules on parametrized weights: written through right_inverse, or refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import regkit
from tests.support.loops import Batches, loss_of, train
from tests.support.wrapped import (
    HOW,
    Positive,
    Product,
    Sinh,
    Symmetric,
    Tanh,
    assert_bitwise_equal,
    effective,
    snapshot,
    with_,
)

pytestmark = pytest.mark.works_with("Parametrized weights")
WRITABLE = ["weight_norm", "weight_norm of the matrix", "a user's own", "chained", "unsafe"]
LR, STRENGTH = 0.5, 0.3
each_writable = pytest.mark.parametrize("how", WRITABLE)


def rule(**rule: object) -> dict[str, object]:
    return {"rules": [{"name": "it", **rule, "target": {"role": "recurrent", **rule.get("target", {})}}]}


def renormed(w: Tensor) -> Tensor:
    """Rows of norm 0.3 at most, by hand."""
    return w * (0.3 / w.norm(dim=1, keepdim=True)).clamp(max=1)


def renormed_gate(w: Tensor) -> Tensor:
    return torch.cat([w[:4], renormed(w[4:8]), w[8:]])


def shrunk(w: Tensor) -> Tensor:
    """The proximal operator of L2."""
    return w / (1 + 2 * LR * STRENGTH)


Change = Callable[[Tensor], Tensor]


def train_by_hand(model: nn.Module, batches: Batches, before: Change | None, after: Change | None) -> None:
    """SGD, with the weight assigned before or after each step, as torch assigns a parametrized one."""

    def assign(change: Change | None) -> None:
        with torch.no_grad():
            weight = model.rnn.weight_hh_l0
            if change is not None and not torch.equal(change(weight), weight):
                model.rnn.weight_hh_l0 = change(weight)

    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for x, y in batches:
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        assign(before)
        optimizer.step()
        assign(after)


CHANGES = {
    "constraint": (rule(constraint="max_norm(0.3)"), None, renormed),
    "a gate's constraint": (rule(constraint="max_norm(0.3)", target={"gate": "forget"}), None, renormed_gate),
    "proximal": (rule(penalty={"kind": "l2", "strength": STRENGTH}, via="proximal"), None, shrunk),
    "decoupled": (
        rule(penalty={"kind": "l2", "strength": STRENGTH}, via="decoupled"),
        lambda w: w - LR * STRENGTH * 2 * w,
        None,
    ),
}


@each_writable
@pytest.mark.parametrize("change", CHANGES)
def test_a_weight_is_written_as_torch_would_assign_it(how, change, make_model, batches):
    spec, before, after = CHANGES[change]
    bare, by_hand, regularized = make_model(), make_model(), make_model()
    for model in (bare, by_hand, regularized):
        HOW[how](model.rnn, "weight_hh_l0")
    train_by_hand(bare, batches, None, None)
    train_by_hand(by_hand, batches, before, after)
    attachment = regkit.attach(regularized, spec)
    train(regularized, torch.optim.SGD(regularized.parameters(), lr=LR), batches)

    wanted = effective(by_hand.rnn, "weight_hh_l0")
    torch.testing.assert_close(effective(regularized.rnn, "weight_hh_l0"), wanted, rtol=0, atol=1e-9)
    assert not torch.allclose(effective(bare.rnn, "weight_hh_l0"), wanted, atol=1e-3)
    if spec["rules"][0].get("constraint"):
        assert attachment.violations()["it"] < 1e-9


@pytest.mark.parametrize("how", [*WRITABLE, "orthogonal"])
def test_feasible_weights_stay_bit_for_bit_in_training(how, make_model, batches):
    constraint = "unit_norm" if how == "orthogonal" else "max_norm(100)"
    bare, constrained = make_model(nn.RNN), make_model(nn.RNN)
    for model in (bare, constrained):
        HOW[how](model.rnn, "weight_hh_l0")
    if how == "orthogonal":  # whose rows are of norm 1 to the last bit only where it is the identity
        for model in (bare, constrained):
            model.rnn.weight_hh_l0 = torch.eye(4, dtype=torch.float64)
            model.rnn.parametrizations.weight_hh_l0.original.requires_grad_(False)
    attachment = regkit.attach(constrained, rule(constraint=constraint, optional=how == "orthogonal"))
    for model in (bare, constrained):
        torch.manual_seed(0)
        train(model, torch.optim.Adam(model.parameters(), lr=0.02), batches)
        attachment.apply_constraints()
    bitwise = snapshot(bare)
    assert_bitwise_equal(bitwise, snapshot(constrained))


@each_writable
def test_writing_keeps_parameters_their_memory_and_the_optimizers_state(how, make_model, batches):
    model = make_model()
    HOW[how](model.rnn, "weight_hh_l0")
    attachment = regkit.attach(model, rule(constraint="max_norm(0.3)"))
    originals = list(model.rnn.parametrizations.parameters())
    pointers = [p.data_ptr() for p in originals]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.2)
    train(model, optimizer, batches)
    state = {p: {name: value.clone() for name, value in optimizer.state[p].items()} for p in originals}
    attachment.apply_constraints()
    now = list(model.rnn.parametrizations.parameters())
    assert all(a is b for a, b in zip(originals, now, strict=True))
    assert pointers == [p.data_ptr() for p in now]
    for p in originals:
        assert state[p]["step"] == 4
        assert all(torch.equal(value, optimizer.state[p][name]) for name, value in state[p].items())


def test_an_orthogonal_weight_takes_a_constraint_that_orthogonal_ones_fulfil(make_model, batches):
    bare, model = make_model(nn.RNN), make_model(nn.RNN)
    for one in (bare, model):
        parametrizations.orthogonal(one.rnn, "weight_hh_l0")
    regkit.attach(model, rule(constraint="unit_norm"))
    for one in (bare, model):
        train(one, torch.optim.SGD(one.parameters(), lr=0.1), batches)
    weight = model.rnn.weight_hh_l0
    torch.testing.assert_close(weight @ weight.T, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(weight, bare.rnn.weight_hh_l0, rtol=0, atol=1e-2)


REFUSED = {
    "no right_inverse": (with_(Tanh), rule(constraint="max_norm(1)"), "Tanh has no right_inverse"),
    "none in a chain": (with_(Sinh, Tanh), rule(constraint="max_norm(1)"), r"Sinh, Tanh has no right_inverse \(Tanh\)"),
    "spectral": (parametrizations.spectral_norm, rule(constraint="max_norm(0.1)"), "_SpectralNorm makes.* another"),
    "orthogonal": (parametrizations.orthogonal, rule(constraint="max_norm(0.1)"), "_Orthogonal makes .* another"),
    "tall orthogonal": (parametrizations.orthogonal, rule(constraint="max_norm(0.1)"), "_Orthogonal makes .* another"),
    "cayley": (
        lambda module, name: parametrizations.orthogonal(module, name, "cayley", use_trivialization=False),
        rule(constraint="unit_norm"),
        "_Orthogonal refuses it: NotImplementedError.*not possible to assign",
    ),
    "not symmetric": (with_(Symmetric), rule(constraint="max_norm(0.1)"), "Symmetric makes .* another"),
    "proximal": (parametrizations.spectral_norm, rule(penalty="l2(1)", via="proximal"), "_SpectralNorm makes"),
    "decoupled": (with_(Tanh), rule(penalty="l2(1)", via="decoupled"), "Tanh has no right_inverse"),
    "too few": (with_(Product, unsafe=True), rule(constraint="max_norm(0.1)"), "with a part of it frozen, another"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_written_is_refused_by_name_and_the_model_is_untouched(case, make_model):
    reparametrize, spec, reason = REFUSED[case]
    model = make_model(nn.LSTM if "tall" in case else nn.RNN)
    reparametrize(model.rnn, "weight_hh_l0")
    if case == "too few":
        model.rnn.parametrizations.weight_hh_l0.original0.requires_grad_(False)
    before, versions = snapshot(model), [p._version for p in model.parameters()]
    with pytest.raises(regkit.AttachError, match=rf"(?s)'it' .*weight_hh_l0 cannot be set to a point.*{reason}"):
        regkit.attach(model, spec)
    assert_bitwise_equal(before, snapshot(model))
    assert versions == [p._version for p in model.parameters()]
    assert regkit.attachments(model) == ()


def test_a_symmetric_weight_takes_a_constraint_of_the_whole_matrix(make_model, batches):
    model = make_model(nn.RNN)
    with_(Symmetric)(model.rnn, "weight_hh_l0")
    regkit.attach(model, rule(constraint="max_norm(0.3, per=matrix)"))
    train(model, torch.optim.SGD(model.parameters(), lr=LR), batches)
    weight = model.rnn.weight_hh_l0.detach()
    assert torch.equal(weight, weight.T)
    assert weight.norm().item() == pytest.approx(0.3)


def test_a_point_at_infinity_is_refused_at_the_step_and_the_weight_stays(make_model, batches):
    """exp(−∞) is 0, but from there no gradient leads back."""
    model = make_model()
    with_(Positive)(model.rnn, "weight_hh_l0")
    attachment = regkit.attach(model, rule(penalty={"kind": "l1", "strength": 9.0}, via="proximal"))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    with pytest.raises(regkit.AttachError, match=r"weight_hh_l0 cannot be set to a point.*Positive"):
        train(model, optimizer, batches)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert attachment.values()["it"] > 0


def test_a_row_of_zeros_is_refused_where_weight_norm_would_make_it_nan(make_model):
    model = make_model()
    parametrizations.weight_norm(model.rnn, "weight_hh_l0")
    with torch.no_grad():
        model.rnn.parametrizations.weight_hh_l0.original1.abs_()
        attachment = regkit.attach(model, rule(constraint="non_negative"))
        model.rnn.parametrizations.weight_hh_l0.original1[3] = -1.0
    before = snapshot(model)
    with pytest.raises(regkit.AttachError, match=r"_WeightNorm makes of right_inverse\(point\) another"):
        attachment.apply_constraints()
    assert_bitwise_equal(before, snapshot(model))


@pytest.mark.parametrize("how", ["spectral_norm", "a user's own without right_inverse", "orthogonal"])
def test_a_constraint_that_a_later_parametrization_makes_impossible_is_an_error_at_the_step(how, make_model, batches):
    model, bare = make_model(), make_model()
    regkit.attach(model, rule(constraint="max_norm(0.1)"))
    for one in (model, bare):
        torch.manual_seed(3)
        HOW[how](one.rnn, "weight_hh_l0")
    torch.manual_seed(0)
    train(bare, torch.optim.SGD(bare.parameters(), lr=LR), batches[:1])
    torch.manual_seed(0)
    with pytest.raises(regkit.AttachError, match=r"rule 'it' \(max_norm.*rnn: weight_hh_l0 cannot be set to a point"):
        train(model, torch.optim.SGD(model.parameters(), lr=LR), batches[:1])
    assert_bitwise_equal(bare.state_dict(), model.state_dict())  # as the optimizer left them


@pytest.mark.parametrize("how", WRITABLE)
def test_a_weight_that_is_parametrized_after_attach_is_constrained_as_it_acts(how, make_model, batches):
    model = make_model()
    attachment = regkit.attach(model, rule(constraint="max_norm(0.3)"))
    HOW[how](model.rnn, "weight_hh_l0")
    train(model, torch.optim.SGD(model.parameters(), lr=LR), batches)
    assert attachment.violations()["it"] < 1e-9
    assert effective(model.rnn, "weight_hh_l0").detach().norm(dim=1).max().item() == pytest.approx(0.3)


def test_frozen_weights_are_attached_to_and_held_once_unfrozen(make_model, batches):
    model = make_model()
    parametrizations.weight_norm(model.rnn, "weight_hh_l0")
    model.rnn.parametrizations.requires_grad_(False)
    attachment = regkit.attach(model, rule(constraint="max_norm(0.3)", optional=True))
    before = {name: p.clone() for name, p in model.rnn.parametrizations.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    train(model, optimizer, batches[:2])
    assert all(torch.equal(p, before[name]) for name, p in model.rnn.parametrizations.named_parameters())
    model.rnn.parametrizations.requires_grad_(True)
    train(model, optimizer, batches[2:])
    assert attachment.violations()["it"] < 1e-9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("how", ["weight_norm", "a user's own", "chained"])
def test_half_precision_originals_are_penalized_and_held(how, dtype, make_model, batches):
    """Against the same in float64: up to the rounding of the originals."""
    exact, model = make_model(nn.RNN), make_model(nn.RNN)
    for one in (exact, model):
        HOW[how](one.rnn, "weight_hh_l0")
    for module in (model.rnn, model.head):
        module.to(dtype)
    spec = {
        "rules": [rule(penalty="l2(0.5)")["rules"][0], {**rule(constraint="max_norm(0.3)")["rules"][0], "name": "c"}]
    }
    attachments = [regkit.attach(one, spec) for one in (exact, model)]
    for one in (exact, model):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.05)
        for x, y in batches:
            kind = one.rnn.weight_ih_l0.dtype
            optimizer.zero_grad()
            loss_of(one, x.to(kind), y.to(kind)).backward()
            optimizer.step()
    tolerance = 8 * torch.finfo(dtype).eps
    assert attachments[1].violations()["c"] < tolerance
    wanted = effective(exact.rnn, "weight_hh_l0")
    torch.testing.assert_close(effective(model.rnn, "weight_hh_l0").double(), wanted, rtol=0, atol=tolerance)
    assert model.rnn.parametrizations.weight_hh_l0.parameters().__next__().dtype == dtype
