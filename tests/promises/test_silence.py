"""Nothing is silently off: what would not be optimized is an error at the step, before anything is changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import regkit

AR = {"rules": [{"name": "ar", "penalty": {"kind": "activity_l2", "strength": 2.0}}]}
OPTIONAL = {"rules": [{**AR["rules"][0], "optional": True}]}
VIA_LOSS = {"rules": [{"name": "decay", "penalty": {"kind": "l2", "strength": 1.0}, "via": "loss"}]}


@pytest.fixture
def model(make_model) -> nn.Module:
    return make_model()


@pytest.fixture
def optimizer(model) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.fixture
def x(batches) -> torch.Tensor:
    return batches[0][0]


def refused(optimizer: torch.optim.Optimizer, model: nn.Module, match: str) -> None:
    weights = [p.clone() for p in model.parameters()]
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    with pytest.raises(regkit.StepError, match=match):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    for before, p in zip(gradients, model.parameters(), strict=True):
        assert (before is None and p.grad is None) or torch.equal(before, p.grad)


def test_activity_that_was_not_consumed_is_an_error(model, optimizer, x):
    regkit.attach(model, AR)
    model(x).sum().backward()
    refused(optimizer, model, r"'ar'.*on rnn recorded outputs that were not consumed.*add attachment.penalty\(\)")


def test_a_training_step_that_recorded_nothing_is_an_error(model, optimizer, x):
    attachment = regkit.attach(model, AR)
    (model.head(model.rnn.forward(x)[0]).sum() + attachment.penalty()).backward()
    refused(optimizer, model, "'ar'.*recorded nothing.*forward\\(\\) instead of being called")


def test_an_optional_rule_may_record_nothing_but_not_leave_activity_unconsumed(model, optimizer, x):
    attachment = regkit.attach(model, OPTIONAL)
    (model.head(model.rnn.forward(x)[0]).sum() + attachment.penalty()).backward()
    optimizer.step()
    model(x).sum().backward()
    refused(optimizer, model, "not consumed")


def test_a_penalty_that_was_taken_but_not_added_to_the_loss_is_an_error(model, optimizer, x):
    attachment = regkit.attach(model, AR)
    out = model(x)
    attachment.penalty()
    out.sum().backward()
    refused(optimizer, model, "was not part of a loss that was backpropagated")


@pytest.mark.parametrize("taken", [False, True])
def test_a_weight_rule_via_the_loss_must_be_in_the_loss(taken, model, optimizer, x):
    attachment = regkit.attach(model, VIA_LOSS)
    if taken:
        attachment.penalty()
    model(x).sum().backward()
    refused(optimizer, model, "'decay'.*was not part of (the|a) loss")


@pytest.mark.parametrize("spec", [AR, VIA_LOSS])
def test_each_step_is_checked_anew(spec, model, optimizer, x):
    attachment = regkit.attach(model, spec)
    (model(x).sum() + attachment.penalty()).backward()
    optimizer.step()
    optimizer.zero_grad()
    model(x).sum().backward()
    refused(optimizer, model, "consumed|part of the loss")


def test_evaluation_under_no_grad_records_nothing(model, optimizer, x):
    attachment = regkit.attach(model, AR)
    with torch.no_grad():
        model(x)
    (model(x).sum() + attachment.penalty()).backward()
    with torch.inference_mode():
        model(x)
    optimizer.step()


def test_evaluation_with_gradients_is_not_pooled_into_the_training_loss(model, x):
    attachment = regkit.attach(model, AR)
    model.eval()
    model(x)
    model.train()
    model(x)
    with pytest.raises(regkit.StepError, match="1 of 2 recorded outputs of rnn were made in eval mode"):
        attachment.penalty()


def test_a_model_may_be_trained_in_eval_mode(model, optimizer, x):
    attachment = regkit.attach(model, AR)
    model.eval()
    (model(x).sum() + attachment.penalty()).backward()
    optimizer.step()


def test_a_step_that_does_not_train_the_module_asks_nothing_of_it(model, x):
    attachment = regkit.attach(model, AR)
    head = torch.optim.SGD(model.head.parameters(), lr=0.1)
    rnn = torch.optim.SGD(model.rnn.parameters(), lr=0.1)
    with torch.no_grad():
        h, _ = model.rnn(x)
    model.head(h).sum().backward()
    head.step()

    (model(x).sum() + attachment.penalty()).backward()
    head.step()
    rnn.step()


def test_alternating_optimizers_are_not_confused():
    """As in adversarial training: one network's pending activity is no concern of the other's optimizer."""
    model = nn.ModuleDict({"generator": nn.GRU(2, 3), "critic": nn.GRU(3, 3)})
    attachment = regkit.attach(model, AR)
    critic = torch.optim.SGD(model["critic"].parameters(), lr=0.1)
    generator = torch.optim.SGD(model["generator"].parameters(), lr=0.1)
    for _ in range(2):
        made, _ = model["generator"](torch.randn(4, 1, 2))
        kept = attachment.penalty()
        loss = model["critic"](made.detach())[0].sum() + attachment.penalty()
        critic.zero_grad()
        loss.backward()
        critic.step()
        generator.zero_grad()
        score = model["critic"](made)[0].sum()
        (score + kept + attachment.penalty()).backward()
        generator.step()


def test_a_frozen_module_is_checked_with_the_rest_of_the_model(model, x):
    attachment = regkit.attach(model, AR)
    model.rnn.requires_grad_(False)
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    inputs = x.clone().requires_grad_()
    model(inputs).sum().backward()
    refused(optimizer, model, "not consumed")
    attachment.discard()  # what the refused step left behind
    (model(inputs).sum() + attachment.penalty()).backward()
    optimizer.step()


class OutputOnly(nn.LSTM):
    """A subclass that returns the sequence alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)[0]


def test_a_subclass_that_returns_something_else_is_named(x):
    model = nn.ModuleDict({"encoder": OutputOnly(3, 4).double()})
    regkit.attach(model, AR)
    with pytest.raises(regkit.StepError, match=r"encoder \(OutputOnly\) returned what its adapter SequenceAdapter"):
        model["encoder"](x)


def test_accumulated_batches_may_each_add_their_own_penalty(model, optimizer, batches):
    attachment = regkit.attach(model, AR)
    for x, _ in batches:
        ((model(x).sum() + attachment.penalty()) / len(batches)).backward()
    optimizer.step()


def test_a_closure_is_checked_after_it_has_run(model, optimizer, x):
    attachment = regkit.attach(model, AR)

    def closure(penalized: bool) -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(x).sum()
        if penalized:
            loss = loss + attachment.penalty()
        loss.backward()
        return loss

    optimizer.step(lambda: closure(True))
    with pytest.raises(regkit.StepError, match="not consumed"):
        optimizer.step(lambda: closure(False))


def test_a_wrong_number_of_lengths_or_a_wrong_mask_is_an_error(model, x):
    attachment = regkit.attach(model, AR)
    with attachment.lengths([1, 2, 3]):
        model(x)
    with pytest.raises(regkit.StepError, match="3 lengths for a batch of 6"):
        attachment.penalty()
    attachment.detach()

    attachment = regkit.attach(model, AR)
    with attachment.lengths([9] * 6):
        model(x)
    with pytest.raises(regkit.StepError, match="length of 9 for 5 time steps"):
        attachment.penalty()
    attachment.detach()

    attachment = regkit.attach(model, AR)
    with attachment.mask(torch.ones(6, 5, dtype=torch.bool)):
        model(x)
    with pytest.raises(regkit.StepError, match=r"mask\(\) was given \(6, 5\) for an output of \(5, 6\)"):
        attachment.penalty()


@pytest.mark.parametrize("lengths", [[-1, 2], [], [1.5], [True], [[1, 2]]])
def test_lengths_that_are_no_lengths_are_refused_at_once(lengths, model):
    attachment = regkit.attach(model, AR)
    with pytest.raises(ValueError, match="lengths are whole numbers"), attachment.lengths(lengths):
        pass


def test_a_mask_that_is_not_bool_is_refused_at_once(model):
    attachment = regkit.attach(model, AR)
    with pytest.raises(ValueError, match=r"a mask is a bool tensor, got torch\.float32"):
        attachment.mask(torch.ones(2, 2)).__enter__()


def test_a_penalty_of_an_earlier_step_does_not_excuse_this_one(model, optimizer, x):
    attachment = regkit.attach(model, AR)
    (model(x).sum() + attachment.penalty()).backward()
    optimizer.step()
    optimizer.zero_grad()
    model.head(model.rnn.forward(x)[0]).sum().backward()
    refused(optimizer, model, "recorded nothing")

    out = model(x)
    attachment.penalty()
    out.sum().backward()
    refused(optimizer, model, "was not part of a loss")
