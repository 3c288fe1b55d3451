"""skorch nets around an instance and around a class, their copies and searches: attach alone is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from skorch import NeuralNet
from torch import Tensor, nn

import regkit
from tests.support.loops import DECAY, RULE, assert_equal_weights
from tests.support.trainers.skorch_nets import BALL, BOUND, Data, Reader, decayed, generated, made

pytestmark = pytest.mark.works_with("skorch: weights")


@pytest.fixture
def data() -> Data:
    return generated()


def largest_row(module: nn.Module) -> float:
    return max(float(p.detach().norm(dim=1).max()) for p in module.rnn.parameters() if p.dim() == 2)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_an_attached_instance_trains_as_with_weight_decay(optimizer, data):
    model = Reader()
    attachment = regkit.attach(model, RULE)
    net = made(model, optimizer=optimizer).fit(*data)
    assert net.module_ is model
    assert_equal_weights(model, decayed(data, optimizer=optimizer).module_)
    assert attachment.step_count == 8


def test_the_module_of_a_class_is_attached_once_the_net_is_initialized(data):
    net = made(Reader).initialize()
    attachment = regkit.attach(net.module_, RULE)
    net.partial_fit(*data)
    assert_equal_weights(net.module_, decayed(data).module_)

    net = made(Reader, warm_start=True).initialize()
    regkit.attach(net.module_, RULE)
    assert_equal_weights(net.fit(*data).module_, decayed(data).module_)
    assert attachment.step_count == 8


@pytest.mark.parametrize("module", [Reader, Reader()])
def test_max_norm_holds_after_a_fit(module, data):
    net = made(module, optimizer=torch.optim.SGD, lr=0.5).initialize()
    attachment = regkit.attach(net.module_, {"rules": [BALL]})
    net.partial_fit(*data)
    assert attachment.violations()["ball"] < 1e-9
    bare = made(Reader(), optimizer=torch.optim.SGD, lr=0.5).fit(*data)
    assert largest_row(net.module_) <= BOUND + 1e-9 < largest_row(bare.module_)


def test_lbfgs_minimizes_the_loss_plus_the_penalty(data):
    class ByHand(NeuralNet):
        def get_loss(self, *args: Any, **options: Any) -> Tensor:
            penalty = DECAY / 2 * sum(p.square().sum() for p in self.module_.rnn.parameters())
            return super().get_loss(*args, **options) + penalty

    options = {"optimizer": torch.optim.LBFGS, "lr": 0.5, "optimizer__max_iter": 4}
    by_hand = made(Reader(), ByHand, **options).fit(*data)
    model = Reader()
    regkit.attach(model, RULE)
    assert_equal_weights(made(model, **options).fit(*data).module_, by_hand.module_, 1e-7)


def test_an_attached_instance_is_copied_by_clone_with_its_rules(data):
    model = Reader()
    attachment = regkit.attach(model, RULE)
    cloned = clone(made(model)).fit(*data)
    assert cloned.module_ is not model
    assert_equal_weights(cloned.module_, decayed(data).module_)
    assert [one.step_count for one in regkit.attachments(cloned.module_)] == [8]
    assert attachment.step_count == 0


def test_a_grid_search_trains_copies_of_an_attached_instance_by_its_rules(data):
    model = Reader()
    regkit.attach(model, {"rules": [*RULE["rules"], BALL]})
    search = GridSearchCV(made(model), {"lr": [0.01, 0.5]}, cv=2, scoring="neg_mean_squared_error", error_score="raise")
    search.fit(data[0][:, 0], data[1][:, 0])
    assert largest_row(search.best_estimator_.module_) <= BOUND + 1e-9
    [attachment] = regkit.attachments(search.best_estimator_.module_)
    assert attachment.step_count == 8
