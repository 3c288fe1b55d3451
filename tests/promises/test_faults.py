"""After whatever failure, wherever, nothing is counted twice and the next step is right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import regkit
from tests.support.loops import DECAY, RULE, assert_equal_weights, loss_of, rnn_groups, train
from tests.support.plugins.strangers import RULES, Fault, attached, stepping

pytestmark = pytest.mark.works_with("Faults: exceptions")


@pytest.fixture(autouse=True)
def nothing_fails() -> Iterator[None]:
    Fault.after.clear()
    yield
    Fault.after.clear()


@pytest.mark.parametrize("place", ["gradient", "decay", "prox", "project"])
@pytest.mark.parametrize("calls", [0, 1])
def test_after_a_fault_in_a_step_the_next_step_is_right(calls, place, make_model, batches):
    """The fault comes at the first weight or at the second: what was done to the first is not done to it again."""
    faulty, whole = make_model(), make_model()
    rules = [RULES[place] if place != "project" else {"name": "mine", "constraint": "ball"}]
    attachments = [attached(model, *rules) for model in (faulty, whole)]
    before = [p.detach().clone() for p in faulty.parameters()]
    Fault.after["gradient" if place == "decay" else place] = calls
    with pytest.raises(regkit.StepError, match="'mine'"):
        stepping(faulty, attachments[0], batches)()
    Fault.after.clear()
    # What fails behind the update has been a step; what fails before it has been none, and has updated nothing.
    counted = place in ("prox", "project")
    assert attachments[0].step_count == counted
    if place == "gradient":
        assert all(torch.equal(p, old) for p, old in zip(faulty.parameters(), before, strict=True))
    whole.load_state_dict(faulty.state_dict())
    for model, attachment in zip((faulty, whole), attachments, strict=True):
        stepping(model, attachment, batches)()
    assert_equal_weights(faulty, whole, 0)
    assert attachments[0].step_count == counted + 1


@pytest.mark.parametrize("calls", [0, 1])
def test_a_step_that_failed_halfway_asks_for_new_gradients(calls, make_model, batches):
    model = make_model()
    attachment = attached(model, RULES["gradient"])
    step = stepping(model, attachment, batches)
    Fault.after["gradient"] = calls
    with pytest.raises(regkit.StepError, match="'mine'"):
        step()
    Fault.after.clear()
    with pytest.raises(regkit.StepError, match=r"the last step failed.*call zero_grad\(set_to_none=True\)"):
        step()
    stepping(model, attachment, batches)()
    assert attachment.step_count == 1


class Failing(SGD):
    """Fails once within its step, when all hooks have run."""

    failures = 1

    def step(self, closure: Any = None) -> Any:
        if self.failures:
            self.failures -= 1
            raise MemoryError
        return super().step(closure)


SGD([torch.zeros(1, requires_grad=True)])  # torch hooks a class when one of it is first made


@pytest.mark.parametrize("via", ["gradient", "decoupled", "proximal", "loss"])
def test_an_optimizer_that_failed_may_be_asked_again(via, make_model, batches):
    rule = {"penalty": {"kind": "l2", "strength": DECAY / 2}, "via": via}
    faulty, whole = make_model(), make_model()
    attachments = [regkit.attach(model, {"rules": [rule]}) for model in (faulty, whole)]
    for model, attachment, make in zip((faulty, whole), attachments, (Failing, SGD), strict=True):
        optimizer = make(model.parameters(), lr=0.1)
        for x, y in batches:
            optimizer.zero_grad()
            (loss_of(model, x, y) + attachment.penalty()).backward()
            if getattr(optimizer, "failures", 0):
                with pytest.raises(MemoryError):
                    optimizer.step()
                assert attachment.step_count == 0
            optimizer.step()
    assert_equal_weights(faulty, whole, 0)
    assert [one.step_count for one in attachments] == [4, 4]


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("constrained", [False, True])
def test_after_an_optimizer_failed_new_gradients_take_the_place_of_old_ones_but_are_not_added(
    to_none, constrained, make_model, batches
):
    """Added to gradients that hold a penalty, they would hold it twice at the next step."""
    rules = [{"constraint": "max_norm(9)", "target": {"role": "bias"}}] if constrained else []
    rules += [{"penalty": {"kind": "l2", "strength": DECAY / 2}}]
    decayed, model = make_model(), make_model()
    attachment = regkit.attach(model, {"rules": rules})
    failing, optimizer = Failing(model.parameters(), lr=0.1), SGD(rnn_groups(decayed, DECAY), lr=0.1)
    loss_of(model, *batches[0]).backward()
    with pytest.raises(MemoryError):
        failing.step()
    loss_of(model, *batches[1]).backward()
    with pytest.raises(regkit.StepError, match=r"the last step failed.*call zero_grad\(set_to_none=True\)"):
        failing.step()
    for one, its in ((decayed, optimizer), (model, failing)):
        its.zero_grad(set_to_none=to_none)
        for x, y in batches[1:]:  # accumulated
            loss_of(one, x, y).backward()
        its.step()
    assert attachment.step_count == 1
    assert_equal_weights(decayed, model, 1e-12)


@pytest.mark.parametrize("again", ["retried", "new gradients"])
def test_a_closure_that_fails_leaves_nothing_behind(again, make_model, batches):
    decayed, model = make_model(), make_model()
    attachment = regkit.attach(model, RULE)
    optimizer = SGD(rnn_groups(model, 0.0), lr=0.1)
    fails = [True]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, *batches[0])
        loss.backward()
        if fails:
            raise ZeroDivisionError
        return loss

    with pytest.raises(ZeroDivisionError):
        optimizer.step(closure)
    assert attachment.step_count == 0
    fails.clear()
    if again == "retried":
        optimizer.step(closure)
    else:
        train(model, optimizer, batches[:1])
    train(decayed, SGD(rnn_groups(decayed, DECAY), lr=0.1), batches[:1])
    assert_equal_weights(decayed, model)
    assert attachment.step_count == 1


def test_two_attachments_of_which_one_fails_behind_the_update_are_both_counted(make_model, batches):
    model = make_model()
    faulty = attached(model, RULES["project"])
    sound = regkit.attach(model, {"rules": [{"name": "sound", "constraint": "max_norm(0.2)"}]})
    step = stepping(model, faulty, batches)
    Fault.after["project"] = 0
    with pytest.raises(regkit.StepError, match="'mine'"):
        step()
    assert (faulty.step_count, sound.step_count) == (1, 1)
    assert sound.violations()["sound"] < 1e-9


@pytest.mark.parametrize("where", ["in forward", "in the loss", "in backward"])
def test_a_batch_that_failed_and_was_discarded_is_not_counted(where, make_model, batches):
    faulty, whole = make_model(), make_model()
    rule = {"rules": [{"penalty": "activity_l2(0.5)"}, *RULE["rules"]]}
    for model in (faulty, whole):
        attachment = regkit.attach(model, rule)
        optimizer = SGD(model.parameters(), lr=0.1)
        for index, (x, y) in enumerate(batches):
            optimizer.zero_grad()
            if model is faulty and index == 1:
                with pytest.raises(MemoryError):
                    fail(model, attachment, where, *batches[3])
                attachment.discard()
                optimizer.zero_grad()
            (loss_of(model, x, y) + attachment.penalty()).backward()
            optimizer.step()
        assert attachment.step_count == 4
    assert_equal_weights(faulty, whole, 0)


def fail(model: nn.Module, attachment: regkit.Attachment, where: str, x: Tensor, y: Tensor) -> None:
    def refuse(*_: Any) -> None:
        raise MemoryError

    if where == "in forward":  # the recurrent layer has put out and was recorded
        with model.head.register_forward_pre_hook(refuse):
            model(x)
    h = model.rnn(x)[0]
    loss = nn.functional.mse_loss(model.head(h), y) + attachment.penalty()
    if where == "in the loss":
        refuse()
    h.register_hook(refuse)
    loss.backward()


def test_a_batch_whose_backward_pass_failed_and_was_not_discarded_is_an_error(make_model, batches):
    model = make_model()
    attachment = regkit.attach(model, {"rules": [{"name": "ar", "penalty": "activity_l2(0.5)"}]})
    optimizer = SGD(model.parameters(), lr=0.1)
    with pytest.raises(MemoryError):
        fail(model, attachment, "in the loss", *batches[0])
    (loss_of(model, *batches[1]) + attachment.penalty()).backward()
    with pytest.raises(regkit.StepError, match=r"'ar'.*not part of a loss that was backpropagated.*discard\(\)"):
        optimizer.step()


def test_a_penalty_of_a_step_that_failed_behind_its_update_does_not_excuse_the_next(make_model, batches):
    model = make_model()
    attachment = attached(model, RULES["project"], {"name": "loss", "penalty": "l2(0.1)", "via": "loss"})
    step = stepping(model, attachment, batches)
    Fault.after["project"] = 0
    with pytest.raises(regkit.StepError, match="'mine'"):
        step()
    Fault.after.clear()
    optimizer = SGD(model.parameters(), lr=0.1)
    with pytest.raises(regkit.StepError, match=r"'loss'.*not part of the loss in this step"):
        train(model, optimizer, batches)
