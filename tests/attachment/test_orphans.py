"""Rules whose model is gone, whose modules were moved, or whose outputs were left over: told, or rightly left alone."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import regkit
from regkit.runtime import optimizer_hooks

L2 = {"rules": [{"penalty": "l2(0.1)"}]}
BALL = {"rules": [{"constraint": "max_norm(0.1)"}]}
AR = {"rules": [{"penalty": "activity_l2(1)"}]}
X = torch.ones(3, 2, 3)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor = X) -> None:
    optimizer.zero_grad()
    y = model(x)
    (y[0] if isinstance(y, tuple) else y).square().mean().backward()
    optimizer.step()


def test_a_module_that_is_trained_on_when_its_model_is_gone_is_an_error():
    encoder = Encoder()
    regkit.attach(nn.ModuleList([encoder]), BALL)
    gc.collect()
    with pytest.raises(
        regkit.AttachError, match=r"is gone, and the rules with it, but its module '0.rnn' is trained on"
    ):
        step(encoder, SGD(encoder.parameters(), lr=0.1))


def test_it_is_none_after_detach_and_none_where_other_modules_are_trained():
    encoder, other = Encoder(), Encoder()
    attachment = regkit.attach(nn.ModuleList([encoder]), BALL)
    gc.collect()
    step(other, SGD(other.parameters(), lr=0.1))
    attachment.detach()
    step(encoder, SGD(encoder.parameters(), lr=0.1))


def test_nothing_is_left_when_the_modules_are_gone_as_well():
    listeners = len(optimizer_hooks._listeners)
    model = Encoder()
    gone = weakref.ref(model.rnn)
    regkit.attach(model, BALL)
    del model
    gc.collect()
    assert gone() is None
    assert len(optimizer_hooks._listeners) == listeners


def test_a_module_that_is_replaced_anywhere_above_is_an_error():
    model = nn.ModuleDict({"left": nn.ModuleDict({"encoder": Encoder()})})
    regkit.attach(model, BALL)
    optimizer = SGD(model.parameters(), lr=0.1)
    step(model["left"]["encoder"], optimizer)
    old = model["left"]
    model["left"] = nn.ModuleDict({"encoder": Encoder()})
    optimizer.add_param_group({"params": list(model.parameters())})
    with pytest.raises(regkit.AttachError, match="module 'left' was replaced"):
        step(model["left"]["encoder"], optimizer)
    assert "encoder" in old


def test_a_layer_that_is_frozen_as_a_whole_may_record_nothing():
    """As in a GAN that freezes the other network in each phase, or behind a probe on a frozen encoder."""
    model = nn.ModuleDict({"encoder": Encoder(), "head": nn.Linear(4, 2)})
    attachment = regkit.attach(model, AR)
    optimizer = SGD(model.parameters(), lr=0.1)
    model["encoder"].requires_grad_(False)
    for _ in range(2):
        optimizer.zero_grad()
        (model["head"](model["encoder"](X)).square().mean() + attachment.penalty()).backward()
        optimizer.step()
    assert attachment.step_count == 2


def test_a_frozen_layer_that_gradients_pass_through_is_still_watched_over():
    model = nn.Sequential(nn.Linear(3, 3), Encoder())
    attachment = regkit.attach(model, AR)
    model[1].requires_grad_(False)
    with pytest.raises(regkit.StepError, match="not consumed"):
        step(model, SGD(model.parameters(), lr=0.1))
    attachment.discard()


def gan(attached: bool) -> tuple[nn.Module, nn.Module, list[torch.optim.Optimizer], regkit.Attachment]:
    generator, critic = Encoder(), nn.Linear(4, 1)
    model = nn.ModuleDict({"generator": generator, "critic": critic})
    attachment = regkit.attach(model if attached else generator, AR)
    critic.both = [model]  # in a list, no module of the critic's: rules end with what they were attached to
    return generator, critic, [SGD(one.parameters(), lr=0.1) for one in (generator, critic)], attachment


@pytest.mark.parametrize("attached", [True, False], ids=["to both networks", "to one"])
def test_outputs_may_be_kept_over_the_steps_of_another_network(attached):
    generator, critic, (ours, theirs), attachment = gan(attached)
    fake = generator(X)
    for _ in range(3):
        theirs.zero_grad()
        critic(fake.detach()).mean().backward()
        theirs.step()
    torch.testing.assert_close(attachment.values()["rules/0"], fake.detach().square().mean())
    ours.zero_grad()
    (critic(fake).mean() + attachment.penalty()).backward()
    ours.step()


@pytest.mark.parametrize("attached", [True, False], ids=["to both networks", "to one"])
def test_outputs_of_another_phase_are_not_counted_with_those_of_this_one(attached):
    generator, critic, (ours, theirs), attachment = gan(attached)
    critic(generator(X).detach()).mean().backward()
    theirs.step()
    fake = generator(X)
    with pytest.raises(regkit.StepError, match="from before an optimizer's step and from after it"):
        (critic(fake).mean() + attachment.penalty()).backward()
    attachment.discard()
    ours.zero_grad()
    (critic(generator(X)).mean() + attachment.penalty()).backward()
    ours.step()


class Failing(SGD):
    """Fails at its first step, when all hooks have run."""

    failed = False

    def step(self, closure: object = None) -> None:
        if not self.failed:
            self.failed = True
            raise MemoryError
        super().step()


SGD([torch.zeros(1, requires_grad=True)])  # torch hooks a class when one of it is first made


def retried(documents: Iterator[dict[str, object]] | list[dict[str, object]], change: float = 1.0) -> list[Tensor]:
    torch.manual_seed(5)
    model = Encoder()
    for document in documents:
        regkit.attach(model, document)
    optimizer = Failing(model.parameters(), lr=0.1)
    model(X).square().mean().backward()
    with pytest.raises(MemoryError):
        optimizer.step()
    for parameter in model.parameters() if change != 1.0 else ():
        parameter.grad *= change
    optimizer.step()
    return list(model.parameters())


def test_a_step_taken_again_counts_the_rules_of_two_attachments_once():
    l1 = {"rules": [{"penalty": "l1(0.2)"}]}
    both = {"rules": [*L2["rules"], *l1["rules"]]}
    for one, other in zip(retried([both]), retried([L2, l1]), strict=True):
        torch.testing.assert_close(one, other)


def test_a_step_taken_again_on_gradients_that_were_changed_since_asks_for_new_ones():
    with pytest.raises(regkit.StepError, match=r"not as they were then; call zero_grad"):
        retried([L2], change=0.5)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_after_a_step_that_failed_the_next_batch_is_right(set_to_none):
    models = [Encoder(), Encoder()]
    models[1].load_state_dict(models[0].state_dict())
    for model, fails in zip(models, (True, False), strict=True):
        regkit.attach(model, L2)
        optimizer = Failing(model.parameters(), lr=0.1)
        optimizer.failed = not fails
        if fails:
            model(3 * X).square().mean().backward()
            with pytest.raises(MemoryError):
                optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        model(X).square().mean().backward()
        optimizer.step()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other)


def test_a_step_that_fails_keeps_no_batch_and_no_model_alive():
    def train() -> list[weakref.ref[object]]:
        model = Encoder()
        regkit.attach(model, L2)
        batch = torch.ones(3, 2, 3)
        optimizer = Failing(model.parameters(), lr=0.1)
        model(batch).square().mean().backward()
        with pytest.raises(MemoryError):
            optimizer.step()
        return [weakref.ref(model), weakref.ref(batch)]

    kept = train()
    gc.collect()
    assert [one() for one in kept] == [None, None]


def test_a_weight_without_an_optimizer_is_told_at_each_step():
    model = nn.ModuleDict({"encoder": Encoder(), "head": nn.Linear(4, 2)})
    regkit.attach(model, L2)
    optimizer = SGD(model["head"].parameters(), lr=0.1)
    for _ in range(2):
        model["head"](model["encoder"](X)).sum().backward()
        with pytest.raises(regkit.StepError, match=r"no optimizer owns encoder\.rnn.weight_ih_l0"):
            optimizer.step()
