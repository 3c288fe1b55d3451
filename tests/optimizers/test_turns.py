"""Two optimizers that take turns, with a loss each, as in adversarial training: the schedule of what is in the loss.

The right weights are computed without regkit: penalties written into the losses, with the factor of the step's number.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

import regkit

pytestmark = pytest.mark.works_with("Optimizers that take turns, with a loss each")

RATE, STRENGTH = 0.05, 0.3
COUNTING = {"kind": "linear", "start": 1.0, "end": 1001.0, "steps": 1000}
"""A schedule whose factor at step n is n + 1."""

RULES: dict[str, dict[str, Any]] = {
    "activity": {"penalty": f"activity_l2({STRENGTH})"},
    "weights": {"penalty": f"l2({STRENGTH})", "via": "loss"},
}
RHYTHMS = {
    "in turn": ("critic", "generator") * 4,
    "generator first": ("generator", "critic") * 4,
    "three to one": ("critic", "critic", "critic", "generator") * 3,
    "one to three": ("generator", "critic", "critic", "critic") * 3,
    "changing": ("critic", "generator") * 2 + ("critic", "critic", "generator") * 2 + ("generator", "generator"),
}


class Pair(nn.Module):
    """A generator and a critic. Their losses say which of their outputs a gradient can reach."""

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.critic = nn.GRU(2, 3), nn.GRU(3, 4)

    def loss(self, name: str, noise: Tensor, real: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The loss of one of the two, and the outputs of modules in it."""
        if name == "critic":
            with torch.no_grad():
                fake, _ = self.generator(noise)
            found, judged = self.critic(fake)[0], self.critic(real)[0]
            return found.sum() - judged.sum(), [found, judged]
        fake, _ = self.generator(noise)
        found, _ = self.critic(fake)
        return -found.sum(), [fake, found]


def numbers(rhythm: tuple[str, ...]) -> list[int]:
    """The number of each step: who has stepped already in this one begins the next."""
    found, count, stepped = [], -1, set(rhythm)
    for name in rhythm:
        if name in stepped:
            count, stepped = count + 1, set()
        stepped.add(name)
        found.append(count)
    return found


def batches(number: int) -> list[tuple[Tensor, Tensor]]:
    source = torch.Generator().manual_seed(1)

    def of(features: int) -> Tensor:
        return torch.randn(3, 2, features, generator=source, dtype=torch.float64)

    return [(of(2), of(3)) for _ in range(number)]


def pair() -> Pair:
    torch.manual_seed(0)
    return Pair().double()


def by_hand(what: str, rhythm: tuple[str, ...]) -> Pair:
    """The pair trained by autograd and arithmetic alone."""
    model = pair()
    for name, number, (noise, real) in zip(rhythm, numbers(rhythm), batches(len(rhythm)), strict=True):
        loss, outputs = model.loss(name, noise, real)
        if what == "weights":
            penalty = sum(p.square().sum() for p in model.parameters())
        else:  # the mean over all outputs of a module, for each module
            of = {size: [h for h in outputs if h.size(-1) == size] for size in {h.size(-1) for h in outputs}}
            penalty = sum(torch.cat([h.flatten() for h in found]).square().mean() for found in of.values())
        part = list(getattr(model, name).parameters())
        slopes = torch.autograd.grad(loss + STRENGTH * (number + 1) * penalty, part)
        with torch.no_grad():
            for p, slope in zip(part, slopes, strict=True):
                p -= RATE * slope
    return model


def trained(
    what: str, rhythm: tuple[str, ...], say: bool, every_gradient: bool = False
) -> tuple[Pair, list[Optimizer], regkit.Attachment]:
    model = pair()
    attachment = regkit.attach(model, {"rules": [{"name": "it", **RULES[what], "schedule": COUNTING}]})
    optimizers = {name: SGD(getattr(model, name).parameters(), lr=RATE) for name in ("critic", "generator")}
    for name, (noise, real) in zip(rhythm, batches(len(rhythm)), strict=True):
        optimizer = optimizers[name]
        model.zero_grad() if every_gradient else optimizer.zero_grad()
        loss, _ = model.loss(name, noise, real)
        (loss + attachment.penalty(*[optimizer] * say)).backward()
        optimizer.step()
    return model, list(optimizers.values()), attachment


def assert_equal(one: Pair, other: Pair) -> None:
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("say", [False, True])
@pytest.mark.parametrize("rhythm", RHYTHMS)
def test_penalties_of_outputs_have_the_factor_of_the_step_that_they_are_for(rhythm: str, say: bool):
    """From the first step on, however often each steps: the modules that were called tell who is trained."""
    model, _, attachment = trained("activity", RHYTHMS[rhythm], say)
    assert_equal(model, by_hand("activity", RHYTHMS[rhythm]))
    assert attachment.step_count == numbers(RHYTHMS[rhythm])[-1] + 1


@pytest.mark.parametrize(
    ("rhythm", "say"), [("in turn", False), ("generator first", False), *((rhythm, True) for rhythm in RHYTHMS)]
)
def test_penalties_of_weights_via_loss_have_the_factor_of_the_step_that_they_are_for(rhythm: str, say: bool):
    """Two that step in turn are known; in other rhythms the loop says which optimizer the loss is for."""
    model, _, _ = trained("weights", RHYTHMS[rhythm], say, every_gradient=True)
    assert_equal(model, by_hand("weights", RHYTHMS[rhythm]))


def test_a_rhythm_that_nothing_tells_is_an_error_before_anything_is_optimized_with_a_wrong_factor():
    """All weights are in each loss, and the critic steps twice before the generator has ever stepped."""
    model = pair()
    attachment = regkit.attach(model, {"rules": [{"name": "it", **RULES["weights"], "schedule": COUNTING}]})
    critic = SGD(model.critic.parameters(), lr=RATE)
    generator = SGD(model.generator.parameters(), lr=RATE)
    for (noise, real), told in zip(batches(2), [False, True], strict=True):
        model.zero_grad()
        loss, _ = model.loss("critic", noise, real)
        (loss + attachment.penalty()).backward()
        before = [p.detach().clone() for p in model.parameters()]
        if told:
            with pytest.raises(
                regkit.StepError,
                match=r"^rule 'it' \(l2.* with the factor of step 0, 1, and SGD takes step 1, of which it is 2: which "
                r"optimizer steps next was not known. Tell it, attachment.penalty\(optimizer\)",
            ):
                critic.step()
            assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))
        else:
            critic.step()
    model.zero_grad()
    (model.loss("critic", *batches(1)[0])[0] + attachment.penalty(critic)).backward()
    critic.step()
    assert attachment.step_count == 2
    assert generator is not None


def test_of_two_penalties_before_one_step_neither_may_be_of_another():
    """One is for the generator, whose step would have joined; but the critic steps with both in its gradients."""
    model = pair()
    attachment = regkit.attach(model, {"rules": [{"name": "it", **RULES["activity"], "schedule": COUNTING}]})
    critic = SGD(model.critic.parameters(), lr=RATE)
    generator = SGD(model.generator.parameters(), lr=RATE)
    for names in (["critic"], ["generator", "critic"]):
        for name in names:
            loss, _ = model.loss(name, *batches(1)[0])
            (loss + attachment.penalty()).backward()
        if names == ["critic"]:
            critic.step()
    with pytest.raises(regkit.StepError, match="is in the loss with the factor of step 0"):
        critic.step()
    assert generator is not None


def test_values_between_the_steps_of_two_optimizers_are_of_the_step_that_each_rule_comes_to():
    model = pair()
    rules = [
        {"name": name, "target": {"module": name}, "penalty": "l2(1)", "schedule": COUNTING}
        for name in ("critic", "generator")
    ]
    attachment = regkit.attach(model, {"rules": rules})
    optimizers = {name: SGD(getattr(model, name).parameters(), lr=0.0) for name in ("critic", "generator")}
    squares = {name: sum(p.detach().square().sum() for p in getattr(model, name).parameters()) for name in optimizers}
    seen, right = [], []
    for turn in range(3):
        for name in ("critic", "generator"):
            right.append(squares[name] * (turn + 1))
            seen.append(attachment.values()[name])
            for p in getattr(model, name).parameters():
                p.grad = torch.zeros_like(p)
            optimizers[name].step()
            for p in getattr(model, name).parameters():  # what was optimized is what was told
                torch.testing.assert_close(p.grad, 2 * (turn + 1) * p.detach())
    torch.testing.assert_close(torch.stack(seen), torch.stack(right))


def test_an_optimizer_of_nothing_under_rules_is_no_answer():
    model = pair()
    attachment = regkit.attach(model, {"rules": [{"name": "it", **RULES["weights"], "schedule": COUNTING}]})
    with pytest.raises(regkit.StepError, match=r"penalty\(optimizer\): SGD owns no parameter that rules are about"):
        attachment.penalty(SGD(nn.Linear(2, 2).parameters(), lr=0.1))
