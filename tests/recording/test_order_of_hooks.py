"""Forward hooks beside regkit's: which output is penalized, and what is said of a change behind it."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regkit

X = torch.linspace(-1, 1, 24).reshape(4, 2, 3).double()
RULES = {via: {"rules": [{"penalty": "activity_l2(1)", "via": via}]} for via in ("loss", "inject")}


class Doubles:
    def __call__(self, module: nn.Module, args: Any, result: Any) -> Any:
        return result[0] * 2, result[1]


class Looks:
    """A hook that changes nothing; it may return the same tensors in a new tuple."""

    def __init__(self, returns: bool) -> None:
        self.returns = returns

    def __call__(self, module: nn.Module, args: Any, result: Any) -> Any:
        return tuple(result) if self.returns else None


def make() -> nn.GRU:
    torch.manual_seed(0)
    return nn.GRU(3, 4).double()


def mean_square(model: nn.Module) -> Tensor:
    """The penalty of what the model itself puts out."""
    bare = make()
    bare.load_state_dict(model.state_dict())
    return bare(X)[0].square().mean()


def train_once(model: nn.Module, attachment: regkit.Attachment) -> Tensor:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.zero_grad()
    out = model(X)[0]
    penalty = attachment.penalty()
    (out.sum() * 0 + penalty).backward()
    optimizer.step()
    return penalty.detach()


@pytest.mark.parametrize("leave", [0, 1, 3])
def test_what_is_penalized_stays_as_it_was_when_the_hooks_were_off_for_a_while(leave):
    model = make()
    model.register_forward_hook(Doubles())  # before: it makes what the rule is about
    attachment = regkit.attach(model, RULES["loss"])
    model.register_forward_hook(Doubles())  # behind: it does not
    penalties = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", regkit.RegkitWarning)
        for _ in range(leave):
            with attachment.detached():
                pass
        penalties += [train_once(model, attachment) for _ in range(2)]
    expected = 4 * mean_square(model)
    for penalty in penalties:
        torch.testing.assert_close(penalty, expected)
    assert len(model._forward_hooks) == 3


def test_a_hook_that_joins_while_the_hooks_are_off_stands_behind():
    model = make()
    attachment = regkit.attach(model, RULES["loss"])
    with attachment.detached():
        model.register_forward_hook(Doubles())
    penalty = train_once(model, attachment)
    with pytest.warns(regkit.RegkitWarning, match="behind that of regkit"):
        train_once(model, attachment)
    torch.testing.assert_close(penalty, mean_square(model))


@pytest.mark.parametrize("via", ["loss", "inject"])
def test_a_hook_that_changes_the_output_behind_the_rule_is_told_once(via):
    model = make()
    scale = {} if via == "loss" else {"loss_scale": 1.0}
    attachment = regkit.attach(model, RULES[via], **scale)
    model.register_forward_hook(Doubles())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            (model(X)[0].sum() + attachment.penalty()).backward()
            optimizer.step()

    with pytest.warns(regkit.RegkitWarning, match="a forward hook changes the output of the model") as told:
        train(3)
    train(130)
    assert len(told) == 1
    assert len(model._forward_hooks) == 2


@pytest.mark.parametrize("returns", [False, True])
def test_a_hook_that_changes_nothing_is_not_told_of(returns):
    model = make()
    attachment = regkit.attach(model, RULES["loss"])
    model.register_forward_hook(Looks(returns))
    for _ in range(66):
        train_once(model, attachment)
    assert [type(hook) for hook in model._forward_hooks.values()][1:] == [Looks]


def test_a_hook_that_was_there_before_the_rule_is_not_told_of():
    model = make()
    model.register_forward_hook(Doubles())
    attachment = regkit.attach(model, RULES["loss"])
    for _ in range(2):
        torch.testing.assert_close(train_once(model, attachment), 4 * mean_square(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_between_two_calls_has_hooks_of_its_own(copied):
    model = make()
    attachment = regkit.attach(model, RULES["loss"])
    model.register_forward_hook(Looks(False))
    train_once(model, attachment)  # whoever stands behind is watched at the next call
    twin = copied(model)
    (other,) = regkit.attachments(twin)
    for _ in range(2):
        torch.testing.assert_close(train_once(twin, other), mean_square(twin))
    assert len(twin._forward_hooks) == 2
    train_once(model, attachment)
    assert len(model._forward_hooks) == 2
