"""Wrappers that drop weights: the raw weight is under the rules, or it is an error."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import regkit
from tests.support.loops import Batches, assert_equal_weights, loss_of
from tests.support.wrapped import WeightDrop, WeightDropout

pytestmark = pytest.mark.works_with("Weight-drop wrappers")


def rule(**rule: object) -> dict[str, object]:
    return {"rules": [{"name": "it", **rule, "target": {"role": "recurrent", **rule.get("target", {})}}]}


CONSTRAINT = {"name": "ball", "target": {"role": "recurrent"}, "constraint": "max_norm(0.1)"}


class Dropping(nn.Module):
    def __init__(self, wrapper: str) -> None:
        super().__init__()
        inner = nn.LSTM(3, 4)
        if wrapper == "fastai":
            self.rnn = WeightDropout(inner, 0.5)
        else:
            self.rnn = WeightDrop(inner, ["weight_hh_l0"], 0.5, variational=wrapper == "variational")
        self.head = nn.Linear(4, 2)

    @property
    def raw(self) -> nn.Parameter:
        return next(p for name, p in self.named_parameters() if name.endswith("weight_hh_l0_raw"))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


def dropping(wrapper: str) -> Dropping:
    torch.manual_seed(1)
    return Dropping(wrapper).double()


def train_dropping(model: Dropping, batches: Batches, strength: float = 0.0, bound: float = 1e9) -> None:
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for x, y in batches:
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        (loss + strength * model.raw.square().sum() if strength else loss).backward()
        optimizer.step()
        with torch.no_grad():
            model.raw.copy_(model.raw * (bound / model.raw.norm(dim=1, keepdim=True)).clamp(max=1))


@pytest.mark.parametrize("wrapper", ["fastai", "Salesforce"])
@pytest.mark.parametrize("ran", [False, True])
def test_the_raw_weight_is_penalized_once_and_constrained(wrapper, ran, batches):
    bare, free, by_hand, regularized = models = [dropping(wrapper) for _ in range(4)]
    if ran:
        for model in models:
            model(batches[0][0])
    plan = regkit.resolve(regularized, rule(penalty="l2(0.1)"))
    assert [(site.name, site.parameters) for b in plan.bindings for site in b.weights] == [
        ("rnn.module", ("weight_hh_l0",))
    ]
    attachment = regkit.attach(regularized, {"rules": [*rule(penalty="l2(0.1)")["rules"], CONSTRAINT]})
    raw = regularized.raw
    train_dropping(bare, batches)
    train_dropping(free, batches, 0.1)
    train_dropping(by_hand, batches, 0.1, 0.1)
    train_dropping(regularized, batches)
    assert_equal_weights(by_hand, regularized)
    assert regularized.raw is raw
    assert attachment.violations()["ball"] < 1e-9
    for without in (bare, free):
        assert not torch.allclose(without.raw, raw, atol=1e-3)
    torch.testing.assert_close(attachment.values()["it"], 0.1 * raw.detach().square().sum())


@pytest.mark.parametrize("via", ["proximal", "decoupled"])
def test_a_raw_weight_shrinks_as_any_other(via, batches):
    by_hand, regularized = dropping("fastai"), dropping("fastai")
    regkit.attach(regularized, rule(penalty="l2(0.1)", via=via))
    for model in (by_hand, regularized):
        torch.manual_seed(0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for x, y in batches:
            optimizer.zero_grad()
            loss_of(model, x, y).backward()
            with torch.no_grad():
                if model is by_hand and via == "decoupled":
                    model.raw.mul_(1 - 0.5 * 2 * 0.1)
                optimizer.step()
                if model is by_hand and via == "proximal":
                    model.raw.div_(1 + 2 * 0.5 * 0.1)
    assert_equal_weights(by_hand, regularized)


def test_the_variational_wrapper_whose_raw_weight_gets_no_gradient_is_an_error_that_says_so(batches):
    """`w = nn.Parameter(mask * raw)` is a new leaf: nobody ever trains the raw weight, penalized or not."""
    bare, model = dropping("variational"), dropping("variational")
    before = bare.raw.clone()
    train_dropping(bare, batches)
    assert torch.equal(bare.raw, before)
    regkit.attach(model, rule(penalty="l2(0.1)"))
    with pytest.raises(regkit.AttachError, match=r"weight_hh_l0 is a new Parameter at each forward.*gets no gradient"):
        train_dropping(model, batches)
    with pytest.raises(regkit.ResolveError, match="gets no gradient"):
        regkit.resolve(bare, rule(penalty="l2(0.1)"))


class Hidden(nn.Module):
    """A wrapper that keeps the raw weight under a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 4)
        self.mine = nn.Parameter(self.rnn.weight_hh_l0.detach().clone())
        del self.rnn._parameters["weight_hh_l0"]
        self.rnn.weight_hh_l0 = self.mine * 1


def test_a_wrapper_with_no_raw_weight_is_refused_with_the_reason():
    model = Hidden()
    with pytest.raises(
        regkit.ResolveError, match=r"weight_hh_l0 is computed from another.*no parameter weight_hh_l0_raw"
    ):
        regkit.attach(model, rule(penalty="l2(1)"))
    regkit.attach(model, rule(penalty="l2(1)", target={"role": "kernel"}))


@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_torchs_deprecated_wrappers_are_refused_with_the_cure(wrap):
    lstm = nn.LSTM(3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own: they are deprecated
        wrap(lstm, "weight_hh_l0")
    with pytest.raises(regkit.ResolveError, match=r"weight_hh_l0.*deprecated.*use torch.nn.utils.parametrizations"):
        regkit.attach(lstm, rule(penalty="l2(1)"))


def test_a_neighbours_raw_weight_is_not_taken_for_a_cells_own(batches):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.RNN(3, 4)
            self.weight_hh_l0_raw = nn.Parameter(torch.ones(4, 4))

    model = Two()
    attachment = regkit.attach(model, rule(penalty="l2(1)"))
    torch.testing.assert_close(attachment.values()["it"], model.rnn.weight_hh_l0.detach().square().sum())
