"""skorch's callback and mixin: activity penalties, the history, refits, copies, searches and checkpoints."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from skorch import NeuralNet
from skorch.callbacks import Checkpoint, LoadInitState
from skorch.dataset import Dataset, ValidSplit
from skorch.helper import predefined_split
from torch import Tensor, nn

import regkit
from regkit.integrations.skorch import RegularizationCallback, RegularizedLoss
from tests.support.loops import DECAY, RULE, assert_equal_weights
from tests.support.trainers.skorch_nets import AR, BALL, RULES, Data, Net, Reader, decayed, generated, made

pytestmark = pytest.mark.works_with("skorch: activity penalties")


@pytest.fixture
def data() -> Data:
    return generated()


def by_hand(data: Data, accumulated: int = 1) -> Reader:
    """The loop that a net of `made` stands for, with the activity penalty written into the loss."""
    model, (X, y) = Reader(), map(torch.as_tensor, data)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(2):
        for index, batch in enumerate(torch.arange(24).split(6)):
            h, _ = model.rnn(X[batch])
            loss = nn.functional.mse_loss(model.head(h), y[batch]) + 2 * h.square().mean()
            (loss / accumulated).backward()
            if (index + 1) % accumulated == 0:
                optimizer.step()
                optimizer.zero_grad()
    return model


@pytest.mark.parametrize("module", [Reader, Reader()])
def test_an_activity_penalty_equals_the_loss_written_by_hand(module, data):
    module = copy.deepcopy(module)
    net = made(module, Net, callbacks=[RegularizationCallback({"rules": [AR]})]).fit(*data)
    assert_equal_weights(net.module_, by_hand(data))


class Tall(regkit.Penalty):
    """Σw⁴."""

    kind: Literal["tall"] = "tall"

    def value(self, w: Tensor) -> Tensor:
        return w.pow(4).sum()


def test_a_callback_with_a_registry_of_its_own_survives_clone_and_pickle(data):
    spec = {"rules": [{"name": "tall", "penalty": "tall(0.01)"}]}
    with pytest.raises(regkit.SpecError, match="unknown penalty 'tall'"):
        RegularizationCallback(spec)
    callback = RegularizationCallback(spec, registry=regkit.Registry([Tall]))
    net = made(Reader, Net, callbacks=[callback])
    histories = [one.fit(*data).history for one in (net, clone(net), pickle.loads(pickle.dumps(net)))]
    first, *others = [[row["regkit/tall"] for row in history] for history in histories]
    assert first[0] > 0
    assert all(other == first for other in others)


def test_the_mixin_takes_the_penalty_of_what_was_attached_by_hand(data):
    model = Reader()
    regkit.attach(model, {"rules": [AR]})
    assert_equal_weights(made(model, Net).fit(*data).module_, by_hand(data))


class Accumulating(RegularizedLoss, NeuralNet):
    """Gradient accumulation as skorch documents it."""

    steps = 2

    def get_loss(self, *args: Any, **options: Any) -> Tensor:
        return super().get_loss(*args, **options) / self.steps

    def train_step(self, batch: Any, **fit_params: Any) -> dict[str, Any]:
        step = self.train_step_single(batch, **fit_params)
        if len(self.history[-1, "batches"]) % self.steps == 0:
            self.optimizer_.step()
            self.optimizer_.zero_grad()
        return step


def test_accumulated_batches_divide_the_penalty_with_the_loss(data):
    callback = RegularizationCallback({"rules": [AR]})
    net = made(Reader, Accumulating, callbacks=[callback]).fit(*data)
    assert_equal_weights(net.module_, by_hand(data, accumulated=2))
    assert callback.attachment.step_count == 4


def test_accumulated_batches_leave_weight_rules_as_weight_decay(data):
    model = Reader()
    regkit.attach(model, RULE)
    theirs = decayed(data, kind=Accumulating)
    assert_equal_weights(made(model, Accumulating).fit(*data).module_, theirs.module_)


def test_a_loss_that_would_not_see_the_penalty_is_refused():
    class Halved(NeuralNet):
        def get_loss(self, *args: Any, **options: Any) -> Tensor:
            return super().get_loss(*args, **options) / 2

    with pytest.raises(TypeError, match=r"RegularizedLoss stands before Halved, whose get_loss would not see"):

        class Wrong(RegularizedLoss, Halved):
            pass


def test_an_activity_penalty_without_the_mixin_is_an_error(data):
    net = made(Reader, callbacks=[RegularizationCallback({"rules": [AR]})])
    with pytest.raises(regkit.StepError, match="not consumed before the optimizer's step"):
        net.fit(*data)


def test_validation_neither_trains_nor_is_penalized_and_the_history_has_every_rule(data):
    X, y = data
    held_out = predefined_split(Dataset(X[:6], y[:6]))
    callback = RegularizationCallback(RULES)
    net = made(Reader, Net, callbacks=[callback], train_split=held_out).fit(X, y)
    alone = made(Reader, Net, callbacks=[RegularizationCallback(RULES)]).fit(X, y)
    assert_equal_weights(net.module_, alone.module_, 0)
    with torch.no_grad():
        bare = nn.functional.mse_loss(net.module_(torch.as_tensor(X[:6])), torch.as_tensor(y[:6]))
    assert net.history[-1, "valid_loss"] == pytest.approx(float(bare))
    for key, value in {**callback.attachment.values(), **callback.attachment.violations()}.items():
        assert [np.isfinite(one) for one in net.history[:, f"regkit/{key}"]] == [True, True]
        assert net.history[-1, f"regkit/{key}"] == pytest.approx(float(value))
    squares = sum(p.detach().square().sum() for p in net.module_.rnn.parameters())
    assert net.history[-1, "regkit/l2"] == pytest.approx(float(DECAY / 2 * squares))
    assert net.predict(X).shape == (24, 5, 2)


def test_a_rule_via_the_loss_counts_once_a_batch_and_not_in_validation(data):
    spec = {"rules": [{**RULE["rules"][0], "via": "loss"}]}
    net = made(Reader, Net, callbacks=[RegularizationCallback(spec)], train_split=ValidSplit(4)).fit(*data)
    theirs = decayed(data, train_split=ValidSplit(4))
    assert_equal_weights(net.module_, theirs.module_)
    assert net.history[:, "valid_loss"] == pytest.approx(theirs.history[:, "valid_loss"])


def test_partial_fit_and_warm_starts_go_on_and_fit_begins_anew(data):
    once = made(Reader, Net, callbacks=[RegularizationCallback(RULES)]).fit(*data)
    callback = RegularizationCallback(RULES)
    net = made(Reader, Net, callbacks=[callback], max_epochs=1).fit(*data).partial_fit(*data)
    assert callback.attachment.step_count == 8
    assert_equal_weights(net.module_, once.module_, 0)
    net.set_params(warm_start=True).fit(*data)
    assert callback.attachment.step_count == 12
    net.set_params(warm_start=False, max_epochs=2).fit(*data)
    assert callback.attachment.step_count == 8
    assert_equal_weights(net.module_, once.module_, 0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copied_net_goes_on_bitwise_and_leaves_the_original_alone(copied, data):
    callback = RegularizationCallback(RULES)
    net = made(Reader, Net, callbacks=[callback]).fit(*data)
    other = copied(net)
    other.partial_fit(*data)
    assert callback.attachment.step_count == 8
    assert dict(other.callbacks_)["RegularizationCallback"].attachment.step_count == 16
    assert_equal_weights(net.partial_fit(*data).module_, other.module_, 0)


def test_a_checkpoint_of_skorch_keeps_the_state_and_a_resumed_run_is_bitwise_the_same(data, tmp_path: Path):
    whole = made(Reader, Net, callbacks=[RegularizationCallback(RULES)], max_epochs=5).fit(*data)

    def part(epochs: int) -> NeuralNet:
        kept = Checkpoint(monitor=None, dirname=str(tmp_path), f_regularization="regularization.pt")
        callbacks = [RegularizationCallback(RULES), kept, LoadInitState(kept)]
        return made(Reader, Net, callbacks=callbacks, max_epochs=epochs).fit(*data)

    part(2)
    resumed = part(3)
    assert resumed.regularization_.attachment.step_count == 20
    assert len(resumed.history) == 5
    assert_equal_weights(resumed.module_, whole.module_, 0)


def test_the_state_is_saved_by_the_net_and_may_be_loaded_before_training_begins(data, tmp_path):
    files = {f"f_{name}": str(tmp_path / name) for name in ("params", "optimizer")}
    net = made(Reader, Net, callbacks=[RegularizationCallback(RULES)]).fit(*data)
    net.save_params(**files, f_regularization=str(tmp_path / "regularization"))
    net.partial_fit(*data)
    callback = RegularizationCallback(RULES)
    other = made(Reader, Net, callbacks=[callback]).initialize()
    other.load_params(**files)
    callback.load_state_dict(torch.load(tmp_path / "regularization", weights_only=True))
    assert_equal_weights(other.partial_fit(*data).module_, net.module_, 0)


def test_the_rules_leave_at_the_end_where_that_is_asked_and_come_back_with_their_count(data):
    callback = RegularizationCallback(RULES, detach=True)
    net = made(Reader, Net, callbacks=[callback]).fit(*data)
    assert regkit.attachments(net.module_) == ()
    assert not any(module._forward_hooks for module in net.module_.modules())
    with pytest.raises(regkit.RegkitError, match="nothing is attached"):
        _ = callback.attachment
    net.partial_fit(*data)
    kept = made(Reader, Net, callbacks=[RegularizationCallback(RULES)]).fit(*data).partial_fit(*data)
    assert callback.state_dict()["step_count"] == 16
    assert_equal_weights(net.module_, kept.module_, 0)


def test_fit_makes_a_new_module_of_a_class_which_the_callback_follows(data):
    callback = RegularizationCallback(RULE)
    net = made(Reader, callbacks=[callback]).fit(*data)
    first = net.module_
    assert net.fit(*data).module_ is not first
    assert regkit.attachments(net.module_) == (callback.attachment,)
    assert regkit.attachments(first) == ()
    assert_equal_weights(net.module_, decayed(data).module_)


def test_a_grid_search_may_search_over_documents(data):
    net = made(Reader, Net, callbacks=[("rules", RegularizationCallback(RULE))])
    documents = [{"rules": [{**RULE["rules"][0]}]}, {"rules": [BALL, AR]}]
    search = GridSearchCV(
        net, {"callbacks__rules__spec": documents}, cv=2, scoring="neg_mean_squared_error", error_score="raise"
    )
    search.fit(data[0][:, 0], data[1][:, 0])
    assert search.best_params_["callbacks__rules__spec"] in documents
    fitted = dict(search.best_estimator_.callbacks_)["rules"]
    assert fitted.attachment.step_count == 8
    assert list(fitted.attachment.values()) == [b.key for b in fitted.attachment.plan.bindings if b.key != "ball"]


# torch asks every tensor that it traces for its gradient, and hides the warning in a way that errors are raised before.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_compiled_net_is_no_different(data):
    compiled = {"compile": True, "compile__backend": "eager"}
    net = made(Reader, Net, callbacks=[RegularizationCallback(RULES)], **compiled).fit(*data)
    plain = made(Reader, Net, callbacks=[RegularizationCallback(RULES)]).fit(*data)
    assert_equal_weights(net.module_._orig_mod, plain.module_, 1e-12)


def test_mistakes_in_a_document_are_told_when_the_callback_is_made():
    with pytest.raises(regkit.SpecError, match="unknown penalty 'l3'"):
        RegularizationCallback({"rules": [{"penalty": "l3(1)"}]})
