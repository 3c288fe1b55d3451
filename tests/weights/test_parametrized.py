"""Penalties of parametrized weights: on the weight that acts, read once and without a trace."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import regkit
from tests.support.loops import Batches, assert_equal_weights, loss_of, train
from tests.support.wrapped import (
    HOW,
    Counted,
    Sinh,
    Spoken,
    Tanh,
    assert_bitwise_equal,
    effective,
    evaluating,
    snapshot,
    with_,
)

pytestmark = pytest.mark.works_with("Parametrized weights")
each_way = pytest.mark.parametrize("how", HOW)


def elastic(w: Tensor) -> Tensor:
    return 0.03 * w.abs().sum() + 0.05 * w.square().sum()


def orthogonality(w: Tensor) -> Tensor:
    """Of the gates one by one; each is square."""
    gates = w.split(w.size(1))
    return 0.05 * sum((g @ g.T - torch.eye(len(g), dtype=g.dtype)).square().sum() for g in gates)


KINDS = {
    "l1_l2": ({"kind": "l1_l2", "l1": 0.03, "l2": 0.05}, elastic),
    "orthogonal": ({"kind": "orthogonal", "strength": 0.05}, orthogonality),
}


def spec(penalty: object, via: str = "gradient", **target: object) -> dict[str, object]:
    return {"rules": [{"name": "it", "target": {"role": "recurrent", **target}, "penalty": penalty, "via": via}]}


def train_by_hand(model: nn.Module, batches: Batches, penalty: Callable[[], Tensor], seed: int = 0) -> None:
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for x, y in batches:
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        (loss + penalty()).backward()
        optimizer.step()


def train_regularized(model: nn.Module, batches: Batches, rules: dict[str, object], seed: int = 0) -> regkit.Attachment:
    attachment = regkit.attach(model, rules)
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for x, y in batches:
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        (loss + attachment.penalty()).backward()
        optimizer.step()
    return attachment


@each_way
@pytest.mark.parametrize(("via", "layer"), [("gradient", nn.LSTM), ("loss", nn.GRU), ("gradient", nn.RNN)])
def test_a_penalty_equals_its_hand_written_loss_of_the_weight_that_acts(how, via, layer, make_model, batches):
    bare, by_hand, regularized = make_model(layer), make_model(layer), make_model(layer)
    for model in (bare, by_hand, regularized):
        torch.manual_seed(3)
        HOW[how](model.rnn, "weight_hh_l0")
    kind, formula = KINDS["orthogonal" if how.startswith("weight_norm") else "l1_l2"]
    train_by_hand(bare, batches, lambda: torch.zeros(()))
    train_by_hand(by_hand, batches, lambda: formula(effective(by_hand.rnn, "weight_hh_l0")))
    attachment = train_regularized(regularized, batches, spec(kind, via))

    assert_equal_weights(by_hand, regularized)
    for name, buffer in by_hand.named_buffers():
        torch.testing.assert_close(regularized.get_buffer(name), buffer)
    wanted = formula(effective(by_hand.rnn, "weight_hh_l0"))
    torch.testing.assert_close(attachment.values()["it"], wanted.detach())
    leaf = next(bare.rnn.parametrizations.parameters())
    if not how.startswith("orthogonal") or layer is not nn.RNN:  # the l2 of a square orthogonal matrix is constant
        assert not torch.allclose(leaf, next(regularized.rnn.parametrizations.parameters()), atol=1e-6)


@pytest.mark.parametrize("how", ["weight_norm", "spectral_norm", "orthogonal", "chained"])
@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_so_it_does_in_cells(how, cell, batches):
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        models.append(Spoken(cell).double())
        HOW[how](models[-1].rnn, "weight_ih")
    by_hand, regularized = models
    train_by_hand(by_hand, batches, lambda: elastic(effective(by_hand.rnn, "weight_ih")))
    train_regularized(regularized, batches, spec(KINDS["l1_l2"][0], role="kernel"))
    assert_equal_weights(by_hand, regularized)


@pytest.mark.parametrize("how", ["weight_norm", "spectral_norm", "orthogonal", "unsafe"])
@pytest.mark.parametrize("via", ["gradient", "loss"])
def test_a_gates_penalty_is_of_its_rows_of_the_weight_that_acts(how, via, make_model, batches):
    by_hand, regularized = make_model(nn.GRU), make_model(nn.GRU)
    for model in (by_hand, regularized):
        torch.manual_seed(3)
        HOW[how](model.rnn, "weight_hh_l0")
    train_by_hand(by_hand, batches, lambda: elastic(effective(by_hand.rnn, "weight_hh_l0")[4:8]))
    train_regularized(regularized, batches, spec(KINDS["l1_l2"][0], via, gate="update"))
    assert_equal_weights(by_hand, regularized)


def test_both_biases_may_be_parametrized_under_their_effective_sum(make_model, batches):
    by_hand, regularized = make_model(), make_model()
    for model in (by_hand, regularized):
        with_(Sinh)(model.rnn, "bias_ih_l0")
    train_by_hand(by_hand, batches, lambda: elastic(by_hand.rnn.bias_ih_l0 + by_hand.rnn.bias_hh_l0))
    train_regularized(regularized, batches, spec(KINDS["l1_l2"][0], role="bias", bias="effective"))
    assert_equal_weights(by_hand, regularized)


@each_way
def test_to_attach_and_to_read_leaves_everything_bitwise_as_it_is(how, make_model):
    model = make_model()
    HOW[how](model.rnn, "weight_hh_l0")
    before, training = snapshot(model), [one.training for one in model.modules()]
    versions = [p._version for p in model.parameters()]
    attachment = regkit.attach(model, spec("l2(1)"))
    first, second = attachment.values()["it"], attachment.values()["it"]
    assert_bitwise_equal(before, snapshot(model))
    assert training == [one.training for one in model.modules()]
    assert versions == [p._version for p in model.parameters()]
    with evaluating(model.rnn):
        assert first == second == model.rnn.weight_hh_l0.square().sum()


def test_a_rule_reads_the_weight_once_a_step(make_model, batches):
    model = make_model()
    with_(Counted)(model.rnn, "weight_hh_l0")
    regkit.attach(model, spec("l2(0.1)"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer, batches[:1])
    loss_of(model, *batches[1]).backward()
    counted = model.rnn.parametrizations.weight_hh_l0[0]
    before = counted.calls
    optimizer.step()
    assert counted.calls == before + 1


def test_within_parametrize_cached_the_penalty_is_the_same(make_model, batches):
    models = [make_model(), make_model()]
    by_hand, regularized = models
    for model in models:
        parametrizations.weight_norm(model.rnn, "weight_hh_l0")
    attachment = regkit.attach(regularized, spec(KINDS["l1_l2"][0], "loss"))
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x, y in batches:
            with parametrize.cached():
                extra = elastic(model.rnn.weight_hh_l0) if model is by_hand else attachment.penalty()
                optimizer.zero_grad()
                (loss_of(model, x, y) + extra).backward()
            optimizer.step()
    assert_equal_weights(by_hand, regularized)


@pytest.mark.parametrize("how", ["weight_norm", "spectral_norm", "a user's own", "a user's own without right_inverse"])
def test_a_weight_that_is_parametrized_after_attach_is_penalized_as_it_acts(how, make_model, batches):
    by_hand, regularized = make_model(), make_model()
    regkit.attach(regularized, spec(KINDS["l1_l2"][0]))
    train(regularized, torch.optim.SGD(regularized.parameters(), lr=0.0), batches[:1])
    for model in (by_hand, regularized):
        torch.manual_seed(3)
        HOW[how](model.rnn, "weight_hh_l0")
    train_by_hand(by_hand, batches, lambda: elastic(effective(by_hand.rnn, "weight_hh_l0")))
    torch.manual_seed(0)
    train(regularized, torch.optim.Adam(regularized.parameters(), lr=0.02), batches)
    assert_equal_weights(by_hand, regularized)


@pytest.mark.parametrize(  # torch cannot put two originals in the place of one weight
    ("how", "leave"), [("weight_norm", True), ("a user's own", True), ("a user's own", False)]
)
def test_a_weight_whose_parametrization_is_removed_after_attach_is_penalized_as_it_is_then(
    how, leave, make_model, batches
):
    by_hand, regularized = make_model(), make_model()
    for model in (by_hand, regularized):
        HOW[how](model.rnn, "weight_hh_l0")
    regkit.attach(regularized, spec(KINDS["l1_l2"][0]))
    train_by_hand(by_hand, batches[:2], lambda: elastic(by_hand.rnn.weight_hh_l0))
    train(regularized, torch.optim.Adam(regularized.parameters(), lr=0.02), batches[:2])
    for model in (by_hand, regularized):
        parametrize.remove_parametrizations(model.rnn, "weight_hh_l0", leave_parametrized=leave)
    train_by_hand(by_hand, batches[2:], lambda: elastic(by_hand.rnn.weight_hh_l0))
    train(regularized, torch.optim.Adam(regularized.parameters(), lr=0.02), batches[2:])
    assert_equal_weights(by_hand, regularized)


def test_a_frozen_original_is_left_alone_and_unfreezing_it_works(make_model, batches):
    by_hand, regularized = make_model(), make_model()
    for model in (by_hand, regularized):
        parametrizations.weight_norm(model.rnn, "weight_hh_l0")
        model.rnn.parametrizations.weight_hh_l0.original0.requires_grad_(False)
    regkit.attach(regularized, spec(KINDS["l1_l2"][0]))
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (by_hand, regularized)]
    for part, frozen in ((batches[:2], True), (batches[2:], False)):
        before = by_hand.rnn.parametrizations.weight_hh_l0.original0.clone()
        for model, optimizer in zip((by_hand, regularized), optimizers, strict=True):
            model.rnn.parametrizations.weight_hh_l0.original0.requires_grad_(not frozen)
            for x, y in part:
                optimizer.zero_grad()
                loss = loss_of(model, x, y)
                (loss + elastic(model.rnn.weight_hh_l0) if model is by_hand else loss).backward()
                optimizer.step()
        assert_equal_weights(by_hand, regularized)
        assert torch.equal(before, regularized.rnn.parametrizations.weight_hh_l0.original0) == frozen


def test_a_parametrization_without_right_inverse_takes_penalties_by_gradient(make_model, batches):
    model = make_model()
    with_(Tanh)(model.rnn, "weight_hh_l0")
    with pytest.raises(regkit.AttachError, match=r"rule 'it' \(l2.*weight_hh_l0 cannot be set.*Tanh has no right_inv"):
        regkit.attach(model, spec("l2(1)", "proximal"))
    assert regkit.attachments(model) == ()


def test_a_loss_scale_does_not_overflow_behind_a_half_precision_parametrization():
    """Fused optimizers divide by the scale themselves. strength · 2w · scale fits, 2w · scale alone does not."""
    plain, other = nn.RNNCell(3, 4, dtype=torch.float16), nn.RNNCell(3, 4, dtype=torch.float16)
    other.load_state_dict(plain.state_dict())
    with torch.no_grad():
        for cell in (plain, other):
            cell.weight_hh.fill_(2.0)
    parametrize.register_parametrization(other, "weight_hh", nn.Identity())
    gradients = []
    for cell in (plain, other):
        attachment = regkit.attach(cell, spec("l2(1e-3)"))
        for p in cell.parameters():
            p.grad = torch.zeros_like(p)
        optimizer = torch.optim.Adam(cell.parameters(), lr=0.0, fused=True)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0**16), torch.tensor(0.0)  # as GradScaler does
        optimizer.step()
        attachment.detach()
        gradients.append(next(p for name, p in cell.named_parameters() if "weight_hh" in name).grad)
    assert torch.equal(gradients[0], torch.full((4, 4), 4e-3, dtype=torch.float16))
    torch.testing.assert_close(gradients[1], gradients[0])
