"""Modules whose weights have no shape or no numbers yet: lazy ones, and those on the meta device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter

import regkit
from tests.support.loops import DECAY, RULE, Batches, assert_equal_weights, rnn_groups, train
from tests.support.wrapped import HOW

lazy = pytest.mark.works_with("Lazy modules")
meta = pytest.mark.works_with("Meta-device modules")
BALL = {"name": "ball", "target": {"role": "recurrent"}, "constraint": "max_norm(0.3)"}


class LazyLSTM(LazyModuleMixin, nn.LSTM):
    """An LSTM that learns its input size from its first batch."""

    cls_to_become = nn.LSTM
    weight_ih_l0: UninitializedParameter

    def __init__(self, hidden_size: int) -> None:
        super().__init__(1, hidden_size)
        self.weight_ih_l0 = UninitializedParameter()

    def initialize_parameters(self, x: Tensor, hx: object = None) -> None:
        if self.has_uninitialized_params():
            self.input_size = x.size(-1)
            self.weight_ih_l0.materialize((4 * self.hidden_size, self.input_size))
            self.reset_parameters()


class Model(nn.Module):
    def __init__(self, rnn: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.rnn, self.head = rnn, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


@lazy
def test_a_lazy_recurrent_module_is_refused_with_the_cure_and_works_after_a_forward_pass(batches: Batches):
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        model = Model(LazyLSTM(4), nn.Linear(4, 2)).double()
        for spec in (RULE, {"rules": [{"constraint": "max_norm(1)"}]}):
            with pytest.raises(
                regkit.ResolveError, match=r"weight_ih_l0 has no shape yet \(lazy\); run a batch through"
            ):
                regkit.attach(model, spec)
        assert regkit.attachments(model) == ()
        model(batches[0][0])
        models.append(model)
    decayed, regularized = models
    regkit.attach(regularized, RULE)
    train(decayed, torch.optim.SGD(rnn_groups(decayed, DECAY), lr=0.1), batches)
    train(regularized, torch.optim.SGD(regularized.parameters(), lr=0.1), batches)
    assert_equal_weights(decayed, regularized)


@lazy
def test_a_lazy_module_elsewhere_is_no_matter(batches: Batches):
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        models.append(Model(nn.LSTM(3, 4), nn.LazyLinear(2)).double())
    decayed, regularized = models
    attachment = regkit.attach(regularized, RULE)
    assert attachment.values()["rules/0"] > 0
    for model, decay in ((decayed, DECAY), (regularized, 0.0)):
        torch.manual_seed(0)
        train(model, torch.optim.SGD(rnn_groups(model, decay), lr=0.1), batches)
    assert_equal_weights(decayed, regularized)


def on_meta() -> Model:
    with torch.device("meta"):
        return Model(nn.LSTM(3, 4), nn.Linear(4, 2)).double()


def made(model: Model) -> None:
    model.to_empty(device="cpu")
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.uniform_(-0.5, 0.5)


@meta
@pytest.mark.parametrize("via", ["gradient", "loss", "decoupled", "proximal"])
def test_rules_attached_on_the_meta_device_act_once_the_weights_are_made(via, batches: Batches):
    real, model = on_meta(), on_meta()
    spec = {"rules": [{"penalty": "l2(0.05)", "via": via}, BALL]}
    attachment = regkit.attach(model, spec)
    for one in (real, model):
        made(one)
    other = regkit.attach(real, spec)
    for one, rules in ((real, other), (model, attachment)):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        for x, y in batches:
            optimizer.zero_grad()
            (nn.functional.mse_loss(one(x), y) + rules.penalty()).backward()
            optimizer.step()
    assert_equal_weights(real, model)
    assert attachment.violations()["ball"] < 1e-9
    assert attachment.step_count == 4


@meta
def test_weight_decay_is_what_it_amounts_to(batches: Batches):
    decayed, regularized = on_meta(), on_meta()
    regkit.attach(regularized, RULE)
    for one, decay in ((decayed, DECAY), (regularized, 0.0)):
        made(one)
        train(one, torch.optim.SGD(rnn_groups(one, decay), lr=0.1), batches)
    assert_equal_weights(decayed, regularized)


@meta
def test_on_the_meta_device_a_value_has_no_number_and_says_so():
    model = on_meta()
    attachment = regkit.attach(model, {"rules": [*RULE["rules"], BALL]})
    for told in (attachment.values()["rules/0"], attachment.violations()["ball"], attachment.penalty()):
        assert told.is_meta
        with pytest.raises(RuntimeError, match="meta"):
            float(told)
    attachment.apply_constraints()
    made(model)
    assert attachment.values()["rules/0"] > 0


@meta
@pytest.mark.parametrize("how", ["weight_norm", "a user's own", "unsafe"])
def test_a_parametrized_weight_may_be_attached_to_on_the_meta_device(how, batches: Batches):
    model = on_meta()
    HOW[how](model.rnn, "weight_hh_l0")
    attachment = regkit.attach(model, {"rules": [BALL]})
    made(model)
    train(model, torch.optim.SGD(model.parameters(), lr=0.5), batches)
    assert attachment.violations()["ball"] < 1e-9
    assert model.rnn.weight_hh_l0.detach().norm(dim=1).max().item() == pytest.approx(0.3)


@meta
def test_one_that_cannot_be_written_is_an_error_at_the_first_step(batches: Batches):
    model = on_meta()
    HOW["a user's own without right_inverse"](model.rnn, "weight_hh_l0")
    regkit.attach(model, {"rules": [BALL]})
    made(model)
    with pytest.raises(regkit.AttachError, match=r"rule 'ball' .*Tanh has no right_inverse"):
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), batches)
