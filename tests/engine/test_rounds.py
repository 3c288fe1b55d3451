"""Rounds of several optimizers: which step a penalty is of, before it is known who takes it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer

import regkit
from regkit.runtime.step import StepCount

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
def test_a_rhythm_of_optimizers_is_known_from_its_first_step_on(often: int):
    """The critic steps several times for each time that the generator does, which joins the last of them."""
    model = pair()
    attachment, optimizers = attached(model, "activity_l2(1)"), optimizers_of(model)
    rhythm = ("critic",) * often + ("generator",)
    steps = [told_and_taken(attachment, model[name], optimizers[name]) for name in rhythm * 5]
    wanted = [often * turn + min(i, often - 1) for turn in range(5) for i in range(often + 1)]
    assert [taken for _, taken in steps] == wanted
    assert all(told == taken for told, taken in steps), steps


def test_a_rhythm_that_changes_is_known_at_once():
    model = pair()
    attachment, optimizers = attached(model, "activity_l2(1)"), optimizers_of(model)
    old, new = ("critic", "generator") * 4, ("critic", "critic", "critic", "generator")
    steps = [told_and_taken(attachment, model[name], optimizers[name]) for name in old + new * 5]
    assert all(told == taken for told, taken in steps), steps


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
    assert told_and_taken(attachment, model["generator"], optimizers["generator"]) == (2, 2)


def test_a_resumed_round_is_gone_on_with_whatever_was_before_it():
    """What followed what before the state was loaded says nothing of what follows now."""
    model = pair()
    attachment, optimizers = attached(model, "activity_l2(1)"), optimizers_of(model)
    for name in ("critic", "generator") * 3:
        told_and_taken(attachment, model[name], optimizers[name])
    names = [name for name, _ in model.named_parameters() if "critic" in name]
    attachment.load_state_dict({"version": 2, "step_count": 8, "stepped": names, "due": {}})
    assert told_and_taken(attachment, model["generator"], optimizers["generator"]) == (7, 7)


def test_of_two_rhythms_that_were_there_the_later_one_is_gone_on_with():
    """After a, b came first and c later; c has a parameter in common with a, and so begins a step."""
    count, (a, b, c) = StepCount(), map(frozenset, ({1}, {2}, {1, 3}))
    for one in (a, b, a, c, a):
        count.advance(one)
    assert count.upcoming(lambda: a | b | c, lambda: a | b | c) == count.index(c) == count.count


def test_so_many_steps_are_remembered_and_no_more():
    """A longer memory would be searched at each penalty, longer each time."""
    count, parts = StepCount(), [frozenset({1}), frozenset({2})]
    for turn in range(500):
        count.advance(parts[turn % 2])
    assert len(count.history) < 100


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
    assert told_and_taken(attachment, model["critic"], optimizers["critic"]) == (2, 2)
    assert told_and_taken(attachment, model["generator"], optimizers["generator"]) == (2, 2)
    assert told_and_taken(attachment, model["critic"], optimizers["critic"]) == (3, 3)
