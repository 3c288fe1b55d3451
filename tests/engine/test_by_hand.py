"""`attachment.step()` around an update that no torch optimizer makes does all that is done at an optimizer's step."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

import regkit
from tests.support.loops import Batches, assert_equal_weights, loss_of, train

pytestmark = pytest.mark.works_with("Updates without a torch optimizer")

RATE = 0.1
L2 = {"rules": [{"name": "l2", "penalty": "l2(0.1)"}]}
BALL = {"rules": [{"name": "ball", "constraint": "max_norm(0.3)"}]}
LINEAR = {"kind": "linear", "start": 0.2, "end": 1.0, "steps": 5}
SPECS: dict[str, list[dict[str, Any]]] = {
    "gradient": [{"penalty": {"kind": "l1_l2", "l1": 0.02, "l2": 0.1}}],
    "loss": [{"penalty": "l2(0.1)", "via": "loss"}],
    "proximal": [{"penalty": "l1(0.2)", "via": "proximal"}],
    "decoupled": [{"penalty": "l2(0.5)", "via": "decoupled"}],
    "constraint": [{"constraint": "max_norm(0.3)"}],
    "constraint, every 3": [{"constraint": "max_norm(0.3)", "every": 3}],
    "schedules": [
        {"penalty": "l2(0.5)", "schedule": LINEAR},
        {"target": {"role": "kernel"}, "penalty": "l1(0.2)", "via": "proximal", "schedule": LINEAR},
        {"constraint": "max_norm(0.5)", "schedule": "exponential(1, 0.5, 4, limit=0.1)"},
    ],
    "activity": [{"penalty": "activity_l2(0.5)"}, {"penalty": "temporal(0.3)", "schedule": LINEAR}],
    "activity and weights": [{"penalty": "activity_l2(0.5)"}, {"penalty": "l2(0.1)"}, {"constraint": "unit_norm"}],
}

Update = Callable[[nn.Module], None]


def in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p -= RATE * p.grad


def through_data(model: nn.Module) -> None:
    for p in model.parameters():
        p.data.add_(p.grad.data, alpha=-RATE)


def by_hand(model: nn.Module, attachment: regkit.Attachment, batches: Batches, update: Update) -> None:
    for x, y in batches * 2:
        model.zero_grad()
        (loss_of(model, x, y) + attachment.penalty()).backward()
        with attachment.step(lr=RATE):
            update(model)


def with_torch(model: nn.Module, attachment: regkit.Attachment, batches: Batches, optimizer: Any) -> None:
    for x, y in batches * 2:
        model.zero_grad()
        (loss_of(model, x, y) + attachment.penalty()).backward()
        optimizer.step()


@pytest.mark.parametrize("update", [in_place, through_data])
@pytest.mark.parametrize("name", SPECS)
def test_an_update_by_hand_equals_a_torch_optimizers(name, update, make_model, batches):
    bare, ours, theirs = make_model(), make_model(), make_model()
    attachments = [regkit.attach(model, {"rules": SPECS[name]}) for model in (ours, theirs)]
    by_hand(ours, attachments[0], batches, update)
    with_torch(theirs, attachments[1], batches, SGD(theirs.parameters(), lr=RATE))
    assert_equal_weights(ours, theirs, 1e-14)
    assert [one.step_count for one in attachments] == [8, 8]

    train(bare, SGD(bare.parameters(), lr=RATE), batches * 2)
    assert not torch.allclose(bare.rnn.weight_ih_l0, ours.rnn.weight_ih_l0, atol=1e-6)


@pytest.mark.parametrize("through_data", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_an_optimizer_over_master_copies_equals_the_optimizer_itself(name, through_data, make_model, batches):
    ours, theirs = make_model(), make_model()
    attachments = [regkit.attach(model, {"rules": SPECS[name]}) for model in (ours, theirs)]
    masters = [p.detach().clone().requires_grad_() for p in ours.parameters()]
    inner = Adam(masters, lr=RATE)

    @torch.no_grad()
    def update(model: nn.Module) -> None:
        for master, p in zip(masters, model.parameters(), strict=True):
            master.copy_(p)  # a constraint, say, has moved it since
            master.grad = p.grad.clone()
        inner.step()
        for master, p in zip(masters, model.parameters(), strict=True):
            (p.data if through_data else p).copy_(master)

    by_hand(ours, attachments[0], batches, update)
    with_torch(theirs, attachments[1], batches, Adam(theirs.parameters(), lr=RATE))
    assert_equal_weights(ours, theirs, 1e-12)


def test_gradients_of_autograd_grad_are_put_into_grad(make_model, batches):
    ours, theirs = make_model(), make_model()
    attachments = [regkit.attach(model, L2) for model in (ours, theirs)]
    for x, y in batches * 2:
        gradients = torch.autograd.grad(loss_of(ours, x, y), list(ours.parameters()))
        for p, gradient in zip(ours.parameters(), gradients, strict=True):
            p.grad = gradient
        with attachments[0].step():
            in_place(ours)
    with_torch(theirs, attachments[1], batches, SGD(theirs.parameters(), lr=RATE))
    assert_equal_weights(ours, theirs, 1e-14)


def test_gradients_that_are_not_in_grad_are_an_error(make_model, batches):
    model = make_model()
    attachment = regkit.attach(model, BALL)
    torch.autograd.grad(loss_of(model, *batches[0]), list(model.parameters()))
    with pytest.raises(regkit.StepError, match=r"found no gradient.*into \.grad"), attachment.step():
        raise AssertionError("not reached")
    assert attachment.step_count == 0


def test_constraints_alone_may_be_applied_by_hand(make_model, batches):
    ours, theirs = make_model(), make_model()
    attachments = [regkit.attach(model, BALL) for model in (ours, theirs)]
    for x, y in batches * 2:
        ours.zero_grad()
        loss_of(ours, x, y).backward()
        in_place(ours)
        attachments[0].apply_constraints()
        attachments[0].weights_changed()
        assert attachments[0].violations()["ball"] < 1e-9
    with_torch(theirs, attachments[1], batches, SGD(theirs.parameters(), lr=RATE))
    assert_equal_weights(ours, theirs, 1e-14)


@pytest.mark.parametrize("via", ["proximal", "decoupled"])
def test_a_rule_that_needs_the_learning_rate_says_so(via, make_model, batches):
    model = make_model()
    attachment = regkit.attach(model, {"rules": [{"penalty": "l2(0.1)", "via": via}]})
    loss_of(model, *batches[0]).backward()
    with pytest.raises(regkit.StepError, match=r"attachment.step\(\) has no `lr`"), attachment.step():
        raise AssertionError("not reached")
    with attachment.step(lr=torch.tensor(0.1)):
        in_place(model)
    assert attachment.step_count == 1


def test_a_forgotten_penalty_is_an_error(make_model, batches):
    model = make_model()
    attachment = regkit.attach(model, {"rules": SPECS["activity"]})
    loss_of(model, *batches[0]).backward()
    with pytest.raises(regkit.StepError, match=r"add attachment.penalty\(\)"), attachment.step():
        raise AssertionError("not reached")


# --- where the context stands -----------------------------------------------------------------------------------------


def prepared(make_model: Callable[[], nn.Module], batches: Batches) -> tuple[nn.Module, regkit.Attachment]:
    model = make_model()
    attachment = regkit.attach(model, BALL)
    loss_of(model, *batches[0]).backward()
    return model, attachment


def assert_done(attachment: regkit.Attachment) -> None:
    assert attachment.step_count == 1
    assert attachment.violations()["ball"] < 1e-9


def test_in_an_exit_stack(make_model, batches):
    model, attachment = prepared(make_model, batches)
    with ExitStack() as stack:
        stack.enter_context(attachment.step())
        in_place(model)
    assert_done(attachment)


def test_in_a_context_manager_of_ones_own_while_another_optimizer_steps(make_model, batches):
    model, attachment = prepared(make_model, batches)

    @contextmanager
    def updating() -> Iterator[None]:
        with attachment.step():
            yield

    with updating():
        SGD(nn.Linear(2, 2).parameters(), lr=RATE).step()
        in_place(model)
    assert_done(attachment)


def test_in_asynchronous_code(make_model, batches):
    model, attachment = prepared(make_model, batches)

    async def update() -> None:
        with attachment.step():
            await asyncio.sleep(0)
            in_place(model)

    asyncio.run(update())
    assert_done(attachment)


def test_around_the_step_of_a_torch_optimizer_it_is_one_step(make_model, batches):
    ours, theirs = make_model(), make_model()
    attachments = [regkit.attach(model, L2) for model in (ours, theirs)]
    optimizers = [SGD(model.parameters(), lr=RATE) for model in (ours, theirs)]
    for model, optimizer in zip((ours, theirs), optimizers, strict=True):
        loss_of(model, *batches[0]).backward()
        with attachments[0].step() if model is ours else ExitStack():
            optimizer.step()
    assert_equal_weights(ours, theirs, 0)
    assert [one.step_count for one in attachments] == [1, 1]


def test_steps_do_not_nest(make_model, batches):
    model, attachment = prepared(make_model, batches)
    with attachment.step():
        with pytest.raises(regkit.StepError, match="entered within a step"), attachment.step():
            raise AssertionError("not reached")
        in_place(model)
    assert_done(attachment)


def test_an_update_that_fails_counts_nothing_and_may_be_made_again(make_model, batches):
    ours, theirs = make_model(), make_model()
    attachments = [regkit.attach(model, L2) for model in (ours, theirs)]
    for model, attachment in zip((ours, theirs), attachments, strict=True):
        loss_of(model, *batches[0]).backward()
        if model is ours:
            with pytest.raises(ZeroDivisionError), attachment.step():
                raise ZeroDivisionError
            assert attachment.step_count == 0
        with attachment.step():
            in_place(model)
    assert_equal_weights(ours, theirs, 0)
    assert attachments[0].step_count == 1


def test_of_a_module_that_was_replaced_it_is_an_error(make_model, batches):
    model, attachment = prepared(make_model, batches)
    old = model.rnn
    model.rnn = nn.LSTM(3, 4).double()
    with pytest.raises(regkit.AttachError, match="'rnn' was replaced"), attachment.step():
        raise AssertionError(f"not reached with {old}")


def test_after_detach_it_is_an_error(make_model, batches):
    _, attachment = prepared(make_model, batches)
    attachment.detach()
    with pytest.raises(regkit.RegkitError, match="detached"):
        attachment.step()


def test_frozen_weights_are_left_alone(make_model, batches):
    model = make_model()
    attachment = regkit.attach(model, {"rules": [*L2["rules"], *BALL["rules"]]})
    model.rnn.requires_grad_(False)
    before: Tensor = model.rnn.weight_hh_l0.clone()
    loss_of(model, *batches[0]).backward()
    with attachment.step():
        pass
    assert torch.equal(model.rnn.weight_hh_l0, before)


@pytest.mark.parametrize("via", ["proximal", "decoupled"])
@pytest.mark.parametrize("by_hand", [True, False])
def test_a_learning_rate_of_none_is_no_learning_rate(via, by_hand):
    model = nn.RNN(3, 4)
    attachment = regkit.attach(model, {"rules": [{"penalty": "l2(1)", "via": via}]})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["lr"] = None
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with pytest.raises(regkit.StepError, match="has no `lr`, which a proximal or decoupled rule multiplies"):
        (attachment.step(lr=None).__enter__ if by_hand else optimizer.step)()


def test_where_nothing_is_bound_no_step_is_counted_whoever_makes_it():
    model = nn.RNN(3, 4)
    attachment = regkit.attach(model, {"rules": [{"target": {"module": "x"}, "penalty": "l2(1)", "optional": True}]})
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with attachment.step():
        pass
    assert attachment.step_count == 0
