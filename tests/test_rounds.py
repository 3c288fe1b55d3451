"""Rounds of several optimizers: which step a penalty is of before it is taken, and what is projected in each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim import SGD, Optimizer

import regkit

COUNTING = {"kind": "linear", "start": 0.0, "end": 1000.0, "steps": 1000}
"""A schedule of which the factor is the number of the step."""


def pair() -> nn.ModuleDict:
    return nn.ModuleDict({"generator": nn.GRU(2, 3), "critic": nn.GRU(2, 3)}).double()


def attached(model: nn.ModuleDict, penalty: str) -> regkit.Attachment:
    via = {} if "activity" in penalty else {"via": "loss"}
    return regkit.attach(model, {"rules": [{"penalty": penalty, "schedule": COUNTING, **via}]})


def told_and_taken(attachment: regkit.Attachment, part: nn.Module, optimizer: Optimizer) -> tuple[float, int]:
    """The step that an activity penalty of 1 was of, and the one that the optimizer took."""
    optimizer.zero_grad()
    h, _ = part(torch.randn(4, 1, 2, dtype=torch.float64))
    penalty = attachment.penalty()
    told = float(penalty.detach() / h.detach().square().mean())
    (h.sum() + penalty).backward()
    optimizer.step()
    return pytest.approx(told), attachment.step_count - 1


def optimizers_of(model: nn.ModuleDict) -> dict[str, Optimizer]:
    return {name: SGD(part.parameters(), lr=0.01) for name, part in model.items()}


def test_the_penalties_of_two_optimizers_that_take_turns_are_of_one_step_from_the_first_round_on():
    model = pair()
    attachment, optimizers = attached(model, "activity_l2(1)"), optimizers_of(model)
    steps = [told_and_taken(attachment, model[name], optimizers[name]) for name in ("critic", "generator") * 4]
    assert steps == [(0, 0), (0, 0), (1, 1), (1, 1), (2, 2), (2, 2), (3, 3), (3, 3)]


@pytest.mark.parametrize("often", [2, 3, 5])
def test_a_rhythm_of_optimizers_that_was_there_twice_is_known(often: int):
    """The critic steps several times for each time that the generator does, which joins the last of them."""
    model = pair()
    attachment, optimizers = attached(model, "activity_l2(1)"), optimizers_of(model)
    rhythm = ("critic",) * often + ("generator",)
    steps = [told_and_taken(attachment, model[name], optimizers[name]) for name in rhythm * 5]
    wanted = [often * turn + min(i, often - 1) for turn in range(5) for i in range(often + 1)]
    assert [taken for _, taken in steps] == wanted
    known = steps[2 * len(rhythm) :]
    assert all(told == taken for told, taken in known), known


def test_a_rhythm_that_changes_is_known_again_after_it_was_there_twice():
    model = pair()
    attachment, optimizers = attached(model, "activity_l2(1)"), optimizers_of(model)
    old, new = ("critic", "generator") * 4, ("critic", "critic", "critic", "generator")
    steps = [told_and_taken(attachment, model[name], optimizers[name]) for name in old + new * 5]
    known = steps[len(old) + 2 * len(new) :]
    assert all(told == taken for told, taken in known), known


def test_three_optimizers_that_take_turns_make_one_round():
    model = nn.ModuleDict({name: nn.GRU(2, 3) for name in "abc"}).double()
    attachment, optimizers = attached(model, "activity_l2(1)"), optimizers_of(model)
    steps = [told_and_taken(attachment, model[name], optimizers[name]) for name in "abc" * 3]
    assert steps == [(turn, turn) for turn in range(3) for _ in "abc"]


@pytest.mark.parametrize("left", ["unowned", "frozen"])
def test_a_part_that_nobody_trains_is_waited_for_by_no_step(left: str):
    """One that no optimizer owns, or one that is frozen although an optimizer owns it."""
    model = pair()
    attachment = attached(model, "activity_l2(1)")
    optimizers = {"generator": SGD(model["generator"].parameters(), lr=0.01)}
    if left == "frozen":
        optimizers = optimizers_of(model)
        model["critic"].requires_grad_(False)
    steps = [told_and_taken(attachment, model["generator"], optimizers["generator"]) for _ in range(3)]
    assert steps == [(0, 0), (1, 1), (2, 2)]


def test_a_part_that_is_thawed_and_replaced_is_waited_for_from_then_on():
    """Who owns what is asked once for each model as it is, and who is frozen at each step."""
    model = pair()
    attachment = attached(model, "activity_l2(1)")
    model["critic"].requires_grad_(False)
    optimizers = {"generator": SGD(model["generator"].parameters(), lr=0.01)}
    for expected in (0, 1):
        assert told_and_taken(attachment, model["generator"], optimizers["generator"]) == (expected, expected)
    for name, parameter in list(model["critic"].named_parameters()):
        setattr(model["critic"], name, nn.Parameter(parameter.detach().clone()))
    optimizers["critic"] = SGD(model["critic"].parameters(), lr=0.01)
    assert told_and_taken(attachment, model["critic"], optimizers["critic"]) == (1, 1)
    assert told_and_taken(attachment, model["generator"], optimizers["generator"])[1] == 2


def test_a_resumed_round_is_gone_on_with_whatever_was_before_it():
    """What followed what before the state was loaded says nothing of what follows now."""
    model = pair()
    attachment, optimizers = attached(model, "activity_l2(1)"), optimizers_of(model)
    for name in ("critic", "generator") * 3:
        told_and_taken(attachment, model[name], optimizers[name])
    names = [name for name, _ in model.named_parameters() if "generator" in name]
    attachment.load_state_dict({"version": 2, "step_count": 8, "stepped": names, "due": {}})
    assert told_and_taken(attachment, model["critic"], optimizers["critic"]) == (7, 7)


def test_after_all_was_replaced_the_next_penalty_is_of_a_step_of_its_own():
    """Whoever steps next joins nobody: those that stepped last are gone."""
    model = pair()
    attachment, optimizers = attached(model, "activity_l2(1)"), optimizers_of(model)
    for name in ("critic", "generator") * 2:
        told_and_taken(attachment, model[name], optimizers[name])
    model.load_state_dict({name: one.clone() for name, one in model.state_dict().items()}, assign=True)
    optimizers = optimizers_of(model)
    for part in model.values():
        for parameter in part.parameters():
            parameter.requires_grad_(True)
    assert told_and_taken(attachment, model["critic"], optimizers["critic"])[1] == 2
    assert told_and_taken(attachment, model["generator"], optimizers["generator"]) == (2, 2)
    assert told_and_taken(attachment, model["critic"], optimizers["critic"])[1] == 3


# --- projections -----------------------------------------------------------------------------------------------------


def push(parameters: Sequence[nn.Parameter], optimizer: Optimizer) -> None:
    """A step that makes every number of these grow."""
    for parameter in parameters:
        parameter.grad = -torch.ones_like(parameter)
    optimizer.step()


def halves(kind: str) -> tuple[nn.Module, dict[str, Any], list[list[nn.Parameter]]]:
    """A cell, a constraint on what two parameters make up, and all parameters in two parts, each with one of these."""
    cell = nn.RNNCell(3, 4).double()
    if kind == "weight_norm":
        parametrizations.weight_norm(cell, "weight_hh")
        rule: dict[str, Any] = {"target": {"role": "recurrent"}, "constraint": "max_norm(0.5)"}
        first = cell.parametrizations.weight_hh.original0
    else:
        target = {"role": "bias", "bias": "effective"}
        rule = {"target": target, "constraint": {"kind": "max_norm", "max_value": 0.5, "per": "matrix"}}
        first = cell.bias_ih
    return cell, {"rules": [{"name": "it", **rule}]}, [[first], [p for p in cell.parameters() if p is not first]]


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("kind", ["weight_norm", "effective bias"])
def test_a_constraint_on_what_two_optimizers_make_up_together_holds_after_each_round(kind: str, order: int):
    cell, document, parts = halves(kind)
    attachment = regkit.attach(cell, document)
    optimizers = [(part, SGD(part, lr=0.7)) for part in parts][::order]
    for turn in range(4):
        for part, optimizer in optimizers:
            push(part, optimizer)
        assert attachment.violations()["it"] < 1e-9
        assert attachment.step_count == turn + 1


@pytest.mark.parametrize("kind", ["weight_norm", "effective bias"])
def test_what_two_optimizers_make_up_together_is_projected_at_every_second_round_alone(kind: str):
    cell, document, parts = halves(kind)
    document["rules"][0]["every"] = 2
    attachment = regkit.attach(cell, document)
    optimizers = [(part, SGD(part, lr=0.7)) for part in parts]
    outside = []
    for _ in range(4):
        for part, optimizer in optimizers:
            push(part, optimizer)
        outside.append(bool(attachment.violations()["it"] > 1e-9))
        assert attachment.state_dict()["due"] == {}
    assert outside == [True, False, True, False]


@pytest.mark.parametrize("every", [1, 2])
def test_a_weight_that_is_replaced_and_whose_own_optimizer_steps_first_is_projected_in_that_round(every: int):
    cell = nn.RNNCell(3, 4)
    attachment = regkit.attach(cell, {"rules": [{"name": "it", "constraint": "max_norm(0.5)", "every": every}]})
    optimizer = SGD(cell.parameters(), lr=0.1)
    for _ in range(every):
        push(list(cell.parameters()), optimizer)
    cell.weight_hh = nn.Parameter(torch.ones(4, 4))
    push([cell.weight_hh], SGD([cell.weight_hh], lr=0.1))
    assert attachment.violations()["it"] < 1e-6
    assert attachment.step_count == every
    push([cell.weight_ih, cell.bias_ih, cell.bias_hh], optimizer)
    assert attachment.step_count == every + 1


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("after", [False, True])
def test_tied_weights_do_not_wait_once_all_was_trained(after: bool, every: int):
    model = nn.ModuleList([nn.RNNCell(3, 4), nn.RNNCell(3, 4)])

    def tie() -> None:
        model[1].weight_hh = model[0].weight_hh

    if not after:
        tie()
    attachment = regkit.attach(model, {"rules": [{"name": "it", "constraint": "max_norm(0.5)", "every": every}]})
    if after:
        tie()
    optimizer = SGD(model.parameters(), lr=0.1)
    for _ in range(2 * every):
        push(list(model.parameters()), optimizer)
        assert attachment.state_dict()["due"] == {}


def test_each_of_two_halves_of_a_sum_is_moved_by_the_steps_of_its_own_optimizer_alone():
    cell, document, parts = halves("effective bias")
    regkit.attach(cell, document)
    optimizers = [(part, SGD(part, lr=0.7)) for part in parts]
    for _ in range(2):
        for (part, optimizer), (rest, _) in (optimizers, optimizers[::-1]):
            before = [one.detach().clone() for one in rest]
            push(part, optimizer)
            assert all(torch.equal(one, was) for one, was in zip(rest, before, strict=True))


def test_two_optimizers_leave_nothing_waiting_after_the_nth_round():
    model = nn.ModuleDict({"a": nn.RNNCell(3, 4), "b": nn.RNNCell(3, 4)})
    attachment = regkit.attach(model, {"rules": [{"name": "it", "constraint": "max_norm(0.5)", "every": 2}]})
    optimizers = optimizers_of(model)
    waiting = []
    for _ in range(4):
        for name, optimizer in optimizers.items():
            push(list(model[name].parameters()), optimizer)
            waiting.append({block.split(".")[0] for block in attachment.state_dict()["due"].get("it", [])})
    assert waiting == [set(), set(), {"b"}, set()] * 2


@pytest.mark.parametrize("computed", [False, True])
def test_what_the_nth_step_does_not_train_waits_and_is_projected_once_it_is_trained(computed: bool):
    model = nn.ModuleDict({"a": nn.RNNCell(3, 4), "b": nn.RNNCell(3, 4)})
    for cell in model.values() if computed else ():
        parametrizations.weight_norm(cell, "weight_hh")
    rule = {"name": "it", "target": {"role": "recurrent"}, "constraint": "max_norm(0.5)", "every": 3}
    attachment = regkit.attach(model, {"rules": [rule]})
    optimizer = SGD(model.parameters(), lr=1.0)

    def norm(name: str) -> Tensor:
        return model[name].weight_hh.detach().norm(dim=1)

    for _ in range(3):
        model.zero_grad()
        push(list(model["a"].parameters()), optimizer)
    assert attachment.state_dict()["due"] == {"it": ["b.weight_hh"]}
    attachment.apply_constraints()
    assert attachment.state_dict()["due"] == {"it": ["b.weight_hh"]}
    push(list(model.parameters()), optimizer)  # is not the third
    assert bool((norm("a") > 0.51).all())
    torch.testing.assert_close(norm("b"), torch.full((4,), 0.5))
    assert attachment.state_dict()["due"] == {}
    push(list(model.parameters()), optimizer)
    assert bool((norm("b") > 0.51).all())


def test_what_waits_is_projected_once_by_a_resumed_run_too():
    """The state is of the third step, which is not to begin anew."""
    cell = nn.RNNCell(3, 4)
    attachment = regkit.attach(cell, {"rules": [{"name": "it", "constraint": "max_norm(0.5)", "every": 3}]})
    names = ["weight_ih", "bias_ih", "bias_hh"]
    rest = SGD([cell.get_parameter(name) for name in names], lr=0.1)
    attachment.load_state_dict({"version": 2, "step_count": 3, "stepped": names, "due": {"it": ["weight_hh"]}})
    recurrent = SGD([cell.weight_hh], lr=1.0)
    push([cell.weight_hh], recurrent)
    assert attachment.step_count == 3
    assert attachment.state_dict()["due"] == {}
    torch.testing.assert_close(cell.weight_hh.detach().norm(dim=1), torch.full((4,), 0.5))
    push([cell.get_parameter(name) for name in names], rest)
    push([cell.weight_hh], recurrent)
    assert attachment.step_count == 4
    assert bool((cell.weight_hh.detach().norm(dim=1) > 0.51).all())
