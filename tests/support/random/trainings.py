"""Random trainings: a model under random rules, changed between its steps as people change models, beside a bare twin
that the interpreter regularizes.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim import SGD, Adam, Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

import regkit
from tests.support.random.changes import CHANGES
from tests.support.random.interpreter import Interpreter, gates_of

MODULES: list[Callable[[], nn.Module]] = [
    lambda: nn.GRUCell(3, 4),
    lambda: nn.RNNCell(3, 4),
    lambda: nn.LSTM(3, 4),
    lambda: nn.LSTM(3, 4, proj_size=2),
    lambda: nn.GRU(3, 4, 2, bidirectional=True),
]
STEPS = 8
Pair = tuple[Optimizer, Optimizer]
"""The optimizer of the regularized model, and that of the bare one."""


def random_rule(draw: random.Random, model: nn.ModuleList, name: str) -> dict[str, Any]:
    target: dict[str, Any] = {}
    about = list(model)
    if draw.random() < 0.4:
        number = draw.randrange(len(model))
        target["module"], about = str(number), [model[number]]
    if draw.random() < 0.6:
        target["role"] = draw.choice(["kernel", "recurrent", "bias"])
    if name != "rule 0" and draw.random() < 0.1:  # which may bind nothing; one rule does
        target |= draw.choice([{"layer": 1}, {"direction": "backward"}])
    shared = [gate for gate in gates_of(about[0]) if all(gate in gates_of(one) for one in about)]
    if shared and target.get("role") and draw.random() < 0.3:
        target["gate"] = draw.choice(shared)
    summed = target.get("gate") != "new" if "gate" in target else not any("new" in gates_of(one) for one in about)
    if target.get("role") == "bias" and summed and draw.random() < 0.7:
        target["bias"] = "effective"
    acts = random_penalty(draw) if draw.random() < 0.6 else random_constraint(draw, target)
    return {"name": name, "target": target, "optional": True, **acts}


def random_penalty(draw: random.Random) -> dict[str, Any]:
    kinds = [{"kind": "l1", "strength": 0.05}, {"kind": "l2", "strength": 0.1}, {"kind": "l1_l2", "l1": 0.1, "l2": 0.2}]
    rule: dict[str, Any] = {"penalty": draw.choice(kinds)}
    rule["via"] = draw.choice(["gradient", "gradient", "proximal", "decoupled"])
    if draw.random() < 0.4:
        piecewise = {"kind": "piecewise", "boundaries": [2, 5], "values": [1.0, 0.0, 0.5]}
        rule["schedule"] = draw.choice([piecewise, {"kind": "linear", "start": 0.2, "end": 1.0, "steps": 5}])
    return rule


def random_constraint(draw: random.Random, target: dict[str, Any]) -> dict[str, Any]:
    kind = draw.choice(["max_norm", "unit_norm", "non_negative"])
    rule: dict[str, Any] = {"constraint": {"kind": kind}, "every": draw.choice([1, 1, 2, 3])}
    if kind != "non_negative" and draw.random() < 0.4:
        pools = ["input", "matrix"] if "gate" in target else ["input", "matrix", "cell"]
        rule["constraint"]["per"] = draw.choice(pools)
    if kind == "max_norm":
        rule["constraint"]["max_value"] = 0.4
        if draw.random() < 0.3:
            rule["schedule"] = {"kind": "linear", "start": 2.0, "end": 1.0, "steps": 4}
    return rule


class Training:
    """The same training of two equal models. story: what is done, for the sentence of an error."""

    def __init__(self, seed: int) -> None:
        self.draw, self.noise = random.Random(seed), torch.Generator().manual_seed(seed)
        self.story: list[object] = []
        self.tolerance = 1e-9
        makers = [self.draw.choice(MODULES) for _ in range(self.draw.randint(1, 3))]
        normed = self.draw.random() < 0.2
        self.model, self.bare = (_model(seed, makers, normed) for _ in range(2))
        self.rules = [random_rule(self.draw, self.model, f"rule {i}") for i in range(self.draw.randint(1, 4))]
        self.story += [self.model, *self.rules]
        self.interpreter = Interpreter(self.bare, self.rules)
        self.several = self.draw.random() < 0.35
        self.renew_optimizers()

    def both(self, change: Callable[[nn.ModuleList], object]) -> None:
        for model in (self.model, self.bare):
            change(model)

    # --- optimizers --------------------------------------------------------------------------------------------------

    def renew_optimizers(self) -> None:
        """Begin with new ones, as a loop does that has new parameters."""
        names = [name for name, _ in self.model.named_parameters()]
        cut = self.draw.randint(1, len(names) - 1)
        if self.several:
            plans = [(SGD, [(names[:cut], {"lr": 0.05})]), (Adam, [(names[cut:], {"lr": 0.02})])]
        else:
            if self.draw.random() < 0.15:
                names.pop()  # left out, until a group is added for what is
                cut = min(cut, len(names) - 1)
            parts = [names[:cut], names[cut:]] if self.draw.random() < 0.3 else [names]
            options = [{"lr": lr, "maximize": self.draw.random() < 0.15} for lr in (0.05, 0.02)]
            plans = [(self.draw.choice([SGD, SGD, Adam]), list(zip(parts, options, strict=False)))]
        self.optimizers: list[Pair] = [(_made(self.model, *plan), _made(self.bare, *plan)) for plan in plans]
        self.story.append(plans)

    # --- steps -------------------------------------------------------------------------------------------------------

    def draw_gradients(self) -> None:
        """The same random gradients for both. Some have none; one that is frozen may have one left from before."""
        for ours, theirs in zip(self.model.parameters(), self.bare.parameters(), strict=True):
            gradient = torch.randn(ours.shape, generator=self.noise, dtype=torch.float64)
            missing = self.draw.random() < (0.06 if ours.requires_grad else 0.5)
            for parameter in (ours, theirs):
                parameter.grad = None if missing else gradient.to(parameter.dtype, copy=True)

    def step(self) -> None:
        self.draw_gradients()
        for pair in self.optimizers:
            ways = [plainly, with_a_closure, at_the_second_try] + [by_hand] * (not self.several)
            way = self.draw.choices(ways, [6, 2, 1, 1][: len(ways)])[0]
            self.story.append(way.__name__)
            way(self, pair)
        self.compare()

    def interpreted(self, groups: list[dict[str, Any]], update: Callable[[], object]) -> None:
        step = self.interpreter.before(groups)
        update()
        self.interpreter.after(step)

    def compare(self) -> None:
        """Fail unless both have the same weights, and count the same steps."""
        pairs = zip(self.model.named_parameters(), self.bare.named_parameters(), strict=True)
        for (name, ours), (same, theirs) in pairs:
            assert name == same
            near = {"rtol": self.tolerance, "atol": self.tolerance}
            torch.testing.assert_close(ours, theirs, **near, msg=lambda m, n=name: f"{n}: {m}")
        assert self.attachment.step_count == self.interpreter.count

    def compare_reports(self) -> None:
        found = {**self.attachment.values(), **self.attachment.violations()}
        wanted = self.interpreter.report()
        assert found.keys() == wanted.keys()
        for name, value in found.items():
            assert abs(float(value) - wanted[name]) <= self.tolerance * max(1, abs(wanted[name])), name

    def run(self) -> None:
        """Train to the end. Raises RegkitError where regkit refuses to go on."""
        with regkit.attach(self.model, {"rules": self.rules}) as self.attachment:
            for _ in range(STEPS):
                self.step()
                change = self.draw.choice([*CHANGES, *[None] * 4])
                if change is not None:
                    self.story.append(change.__name__)
                    change(self)
            self.compare_reports()


def _model(seed: int, makers: list[Callable[[], nn.Module]], normed: bool) -> nn.ModuleList:
    """A model; for a seed it is always the same. Not copied: copies of a parametrized module share their class."""
    torch.manual_seed(seed)
    model = nn.ModuleList(make() for make in makers).double()
    if normed:
        name = next(name for name, _ in model[0].named_parameters() if name.startswith("weight_ih"))
        parametrizations.weight_norm(model[0], name)
    return model


def _made(model: nn.Module, kind: type[Optimizer], groups: list[tuple[list[str], dict[str, Any]]]) -> Optimizer:
    own = dict(model.named_parameters())
    return kind([{"params": [own[name] for name in names], **options} for names, options in groups])


# --- the ways to take a step -----------------------------------------------------------------------------------------


def plainly(training: Training, pair: Pair) -> None:
    ours, theirs = pair
    ours.step()
    training.interpreted(theirs.param_groups, theirs.step)


def with_a_closure(training: Training, pair: Pair) -> None:
    """The gradients are there only after the closure has been called."""
    ours, theirs = pair
    gradients = {p: p.grad for group in ours.param_groups for p in group["params"]}
    ours.zero_grad()

    def closure() -> Tensor:
        for p, gradient in gradients.items():
            p.grad = gradient
        return torch.zeros(())

    ours.step(closure)
    training.interpreted(theirs.param_groups, theirs.step)


def at_the_second_try(training: Training, pair: Pair) -> None:
    """A hook of all optimizers fails at first, behind regkit's."""
    ours, theirs = pair
    hook = register_optimizer_step_pre_hook(lambda *_: 1 / 0)
    try:
        with suppress(ZeroDivisionError):
            ours.step()
    finally:  # a step that is refused must not leave it to all others
        hook.remove()
    ours.step()
    training.interpreted(theirs.param_groups, theirs.step)


def by_hand(training: Training, pair: Pair) -> None:
    """No optimizer, but a line of arithmetic."""

    @torch.no_grad()
    def update(model: nn.Module) -> None:
        for p in model.parameters():
            if p.grad is not None:
                p.sub_(p.grad, alpha=0.05)

    with training.attachment.step(lr=0.05):
        update(training.model)
    group = {"params": list(training.bare.parameters()), "lr": 0.05}
    training.interpreted([group], lambda: update(training.bare))
