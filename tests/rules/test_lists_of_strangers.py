"""What a list form is given; and that one which does not do what the loop does is refused before it trains anything."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import regkit
from regkit import Constraint, Penalty
from regkit.weights.batch import Placed
from regkit.weights.block import Block


class Noted(regkit.Penalty):
    """L2 that notes what it is given in one list."""

    kind: Literal["noted"] = "noted"

    def value(self, w: Tensor) -> Tensor:
        return w.square().sum()

    def add_gradients(self, weights: list[Tensor], gradients: list[Tensor], amount: float) -> None:
        LISTS.append(weights)
        torch._foreach_add_(gradients, weights, alpha=2 * amount)


LISTS: list[list[Tensor]] = []


def step_on_ones(model: nn.Module, **options: Any) -> list[list[Tensor]]:
    """The lists of one step whose loss has the gradient 1 everywhere."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, **options)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    LISTS.clear()
    optimizer.step()
    return list(LISTS)


def attach_mine(model: nn.Module, *kinds: type[Any], **rule: Any) -> regkit.Attachment:
    registry = regkit.Registry([PluginOf(*kinds)])
    rules = [
        {"constraint" if issubclass(kind, Constraint) else "penalty": {"kind": kind.kind_name()}} for kind in kinds
    ]
    for one in rules:
        if "penalty" in one:
            one["penalty"]["strength"] = 0.05
        one.update(rule)
    return regkit.attach(model, {"rules": rules}, registry=registry)


class PluginOf:
    """A plugin of these kinds."""

    def __init__(self, *kinds: type[Any]) -> None:
        self.kinds = kinds

    @regkit.hookimpl
    def regkit_penalties(self) -> list[type[Penalty]]:
        return [kind for kind in self.kinds if issubclass(kind, Penalty)]

    @regkit.hookimpl
    def regkit_constraints(self) -> list[type[Constraint]]:
        return [kind for kind in self.kinds if issubclass(kind, Constraint)]


def test_weights_of_one_dtype_come_in_one_list_and_a_change_of_dtype_is_noticed():
    model = nn.ModuleList([nn.LSTM(3, 4), nn.GRU(3, 4)])
    attach_mine(model, Noted)
    assert [len(one) for one in step_on_ones(model)] == [8]
    model[1].double()  # each parameter is the object that it was
    lists = step_on_ones(model)
    assert [(len(one), one[0].dtype) for one in lists] == [(4, torch.float32), (4, torch.float64)]
    before = [p.detach().clone() for p in model.parameters()]
    step_on_ones(model)
    for p, old in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.1 * (1 + 0.1 * old))


def test_weights_that_are_replaced_or_get_other_memory_are_followed():
    model = nn.LSTM(3, 4)
    attach_mine(model, Noted, target={"gate": ["forget", "cell"]})
    step_on_ones(model)
    model.load_state_dict({key: torch.randn_like(one) for key, one in model.state_dict().items()}, assign=True)
    model.weight_hh_l0.data = torch.randn(16, 4)
    before = model.weight_hh_l0.detach().clone()
    step_on_ones(model)
    wanted = before - 0.1
    wanted[4:12] -= 0.1 * 0.1 * before[4:12]
    torch.testing.assert_close(model.weight_hh_l0.detach(), wanted)


def test_no_list_is_empty():
    model = nn.LSTM(3, 4)
    attachment = attach_mine(model, Noted)
    model.requires_grad_(False)
    model.weight_hh_l0.requires_grad_(True)
    assert [len(one) for one in step_on_ones(model)] == [1]
    other = nn.Linear(1, 1)
    assert step_on_ones(other) == []
    model.requires_grad_(False).zero_grad()
    assert attachment.values()["rules/0"] == 0


def test_blocks_that_have_numbers_in_common_are_never_together():
    model = nn.LSTM(3, 4)
    whole, forget, cell = (
        regkit.resolve(model, {"rules": [{"target": {"role": "recurrent", **gate}, "penalty": "l2(1)"}]})
        .bindings[0]
        .weights[0]
        for gate in ({}, {"gate": "forget"}, {"gate": "cell"})
    )
    straddling = replace(forget, start=2)

    def sizes(*sites: regkit.WeightSite) -> list[int]:
        blocks = [Block(site, model, None, "matrix") for site in sites]
        placed = Placed.of([(block, block.storages()) for block in blocks], regkit.Registry().kind("l2")(strength=1))
        return [len(batch.blocks) for batch in placed.batches]

    assert sizes(forget, cell) == [2]
    assert sizes(whole, forget) == sizes(forget, straddling) == []


# --- a stranger's list form ------------------------------------------------------------------------------------------


def lists_of(**forms: Any) -> type[Any]:
    """A penalty or a constraint with these list forms, otherwise right."""
    namespace = {"__module__": __name__, "__doc__": "A stranger's.", **forms}
    if "project_" in forms:
        namespace |= {"__annotations__": {"kind": Literal["theirs"]}, "kind": "theirs"}
        namespace |= {"project": lambda self, w: w.clamp(max=0.5), "violation": lambda self, w: (w - 0.5).relu().amax()}
        return type("Theirs", (Constraint,), namespace)
    namespace |= {"__annotations__": {"kind": Literal["theirs"]}, "kind": "theirs"}
    namespace["value"] = lambda self, w: w.square().sum()
    return type("Theirs", (Penalty,), namespace)


def halved(self: Any, weights: list[Tensor], gradients: list[Tensor], amount: float) -> None:
    torch._foreach_add_(gradients, weights, alpha=amount)


def downwards(self: Any, weights: list[Tensor], gradients: list[Tensor], amount: float) -> None:
    torch._foreach_add_(gradients, weights, alpha=-2 * amount)


def without_amount(self: Any, weights: list[Tensor], gradients: list[Tensor], amount: float) -> None:
    torch._foreach_add_(gradients, weights, alpha=2)


def overwriting(self: Any, weights: list[Tensor], gradients: list[Tensor], amount: float) -> None:
    torch._foreach_copy_(gradients, torch._foreach_mul(weights, 2 * amount))


def forgetful(self: Any, weights: list[Tensor], gradients: list[Tensor], amount: float) -> None:
    torch._foreach_add_(gradients[:-1], weights[:-1], alpha=2 * amount)


def spoiling(self: Any, weights: list[Tensor], gradients: list[Tensor], amount: float) -> None:
    torch._foreach_mul_(weights, 2 * amount)
    torch._foreach_add_(gradients, weights)


def out_of_place(self: Any, weights: list[Tensor], gradients: list[Tensor], amount: float) -> None:
    gradients[:] = torch._foreach_add(gradients, weights, alpha=2 * amount)


def right(self: Any, weights: list[Tensor], gradients: list[Tensor], amount: float) -> None:
    torch._foreach_add_(gradients, weights, alpha=2 * amount)


WRONG = {
    "half of it": {"add_gradients": halved},
    "downwards": {"add_gradients": downwards},
    "without the amount": {"add_gradients": without_amount},
    "over the gradient": {"add_gradients": overwriting},
    "without the last": {"add_gradients": forgetful},
    "in the weights, too": {"add_gradients": spoiling},
    "in new tensors": {"add_gradients": out_of_place},
    "a mean": {"values": lambda self, weights: torch.stack([w.square().mean() for w in weights]).sum()},
    "the first's": {"values": lambda self, weights: weights[0].square().sum()},
    "one for each": {"values": lambda self, weights: torch.stack([w.square().sum() for w in weights])},
    "a projection in new tensors": {"project_": lambda self, weights: torch._foreach_clamp_max(weights, 0.5)},
    "another bound": {"project_": lambda self, weights: torch._foreach_clamp_max_(weights, 0.6)},
    "the other side": {"project_": lambda self, weights: torch._foreach_clamp_min_(weights, 0.5)},
    "all but the last": {"project_": lambda self, weights: torch._foreach_clamp_max_(weights[:-1], 0.5)},
}


@pytest.mark.parametrize("forms", WRONG.values(), ids=WRONG)
def test_a_list_form_that_does_not_do_what_the_loop_does_is_refused_at_attach(forms: dict[str, Any]):
    model = nn.LSTM(3, 4)
    kept = {key: one.clone() for key, one in model.state_dict().items()}
    (form,) = forms
    loop = {"values": "value", "add_gradients": "gradient", "project_": "project"}[form]
    with pytest.raises(regkit.PluginError, match=rf"'rules/0': {form} of .*Theirs does not do.*loop over its {loop} "):
        attach_mine(model, lists_of(**forms))
    assert regkit.attachments(model) == ()
    torch.testing.assert_close(dict(model.state_dict()), kept, rtol=0, atol=0)


@pytest.mark.parametrize("hidden", [4, 5, 7])
def test_a_right_list_form_is_not_refused_where_large_products_cancel(hidden: int):
    """As in the middle row of a ramp from -100 to 100, whose orthogonal gradient is a millionth of its neighbours'."""
    rule = {"penalty": "orthogonal(0.1)", "target": {"role": "recurrent"}}
    model = nn.LSTM(4, hidden)
    with regkit.attach(model, {"rules": [rule]}) as attachment:
        assert float(attachment.values()["rules/0"]) > 0


def test_values_that_autograd_does_not_follow_are_refused_where_they_go_into_the_loss():
    def detached(self: Any, weights: list[Tensor]) -> Tensor:
        return torch.stack([w.detach().square().sum() for w in weights]).sum()

    attach_mine(nn.LSTM(3, 4), lists_of(values=detached))  # nothing asks for its gradient
    with pytest.raises(regkit.PluginError, match=r"failed on weight_ih_l0 and 3 more: .*does not require grad"):
        attach_mine(nn.LSTM(3, 4), lists_of(values=detached), via="loss")


def test_a_right_list_form_of_a_stranger_is_used_and_one_on_meta_weights_is_tried():
    attach_mine(nn.LSTM(3, 4), lists_of(add_gradients=right))
    attach_mine(nn.LSTM(3, 4, device="meta"), lists_of(add_gradients=right))
    with pytest.raises(regkit.PluginError, match="add_gradients"):
        attach_mine(nn.LSTM(3, 4, device="meta"), lists_of(add_gradients=halved))


@pytest.mark.parametrize(
    ("form", "told"),
    [("add_gradients", r"weight_ih_l0 and 3 more"), ("project_", r"weight_ih_l0 and 1 more")],
)
def test_what_fails_in_a_list_form_is_told_with_the_first_weight_and_how_many_more(form: str, told: str):
    calls: list[int] = []

    def failing(self: Any, weights: list[Tensor], *rest: Any) -> None:
        calls.append(len(weights))
        if len(calls) > 1:  # the first is at attach
            raise ZeroDivisionError("theirs")
        (right(self, weights, *rest) if rest else torch._foreach_clamp_max_(weights, 0.5))

    model = nn.LSTM(3, 4)
    attachment = attach_mine(model, lists_of(**{form: failing}))
    with pytest.raises(regkit.StepError, match=rf"'rules/0': theirs.*failed on {told}: ZeroDivisionError") as caught:
        step_on_ones(model)
    assert __name__ in str(caught.value)
    assert attachment.step_count == (form == "project_")


def test_a_sparse_gradient_is_an_error_that_names_the_rule():
    model = nn.LSTM(3, 4)
    regkit.attach(model, {"rules": [{"penalty": "l2(0.1)"}]})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.weight_hh_l0.grad = torch.zeros(16, 4).to_sparse()
    with pytest.raises(regkit.StepError, match=r"'rules/0': l2.*failed on weight_ih_l0 and 3 more"):
        optimizer.step()
