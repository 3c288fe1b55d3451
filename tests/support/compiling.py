"""Models and optimizers to compile, and what they are to train to: an uncompiled loop, its penalties by hand."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import regkit
from tests.support.cells import AR_TAR, Looped, Sequenced

WARNINGS = [
    # The compiler looks at .grad of whatever goes into a graph, which torch itself warns of.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    # Inductor, and dynamo where it compiles optimizers, import a module of torch that uses what torch has deprecated.
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]
COMPILED_STEPS: dict[str, CompileStep] = {
    "bound method": lambda optimizer: torch.compile(optimizer.step, backend="aot_eager"),
    "function": lambda optimizer: torch.compile(lambda: optimizer.step(), backend="aot_eager"),
}
COMPILED = COMPILED_STEPS["bound method"]  # rounds otherwise than the uncompiled one: it is compared with itself
INDUCTOR = "inductor" if shutil.which("g++") else "aot_eager"
RAMP = {"kind": "linear", "start": 0.5, "end": 1.5, "steps": 3}
SPEC = {
    "rules": [
        {**AR_TAR["rules"][0], "schedule": RAMP},
        AR_TAR["rules"][1],
        {"name": "l2", "penalty": "l2(0.05)", "schedule": RAMP},
        {"name": "ball", "target": {"role": "recurrent"}, "constraint": "max_norm(0.6)"},
    ]
}
MODELS = [(Looped, nn.GRUCell), (Sequenced, nn.LSTM)]
Batches = list[tuple[Tensor, Tensor]]
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]
CompileStep = Callable[[torch.optim.Optimizer], Callable[..., object]]


def short(batches: Batches) -> Batches:
    """Of a loop over a cell, each step is compiled."""
    return [(x[:3], y[:3]) for x, y in batches]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=torch.tensor(0.02, dtype=torch.float64))


def train_by_hand(
    model: nn.Module,
    batches: Batches,
    optimizer: MakeOptimizer = sgd,
    compile_step: CompileStep = lambda optimizer: optimizer.step,
) -> None:
    stepper = optimizer(model)
    update = compile_step(stepper)
    for step, (x, y) in enumerate(batches):
        factor = min(0.5 + step / 3, 1.5)
        h = model.outputs(x)
        decay = 0.05 * factor * sum(p.square().sum() for p in model.rnn.parameters())
        ar, tar = 2.0 * factor * h.square().mean(), (h[1:] - h[:-1]).square().mean()
        stepper.zero_grad()
        (nn.functional.mse_loss(model.head(h), y) + ar + tar + decay).backward()
        update()
        with torch.no_grad():
            for name, weight in model.rnn.named_parameters():
                if name.startswith("weight_hh"):
                    weight.mul_((0.6 / weight.norm(dim=1, keepdim=True)).clamp(max=1))


def train_with(
    attachment: regkit.Attachment,
    forward: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    step: Callable[[], object] | None = None,
) -> None:
    for x, y in batches:
        optimizer.zero_grad()
        (nn.functional.mse_loss(forward(x), y) + attachment.penalty()).backward()
        (step or optimizer.step)()


def compiled(model: nn.Module, in_place: bool, backend: str = "aot_eager") -> nn.Module:
    fullgraph = isinstance(model, Looped)  # of an nn.LSTM, torch makes no graph
    if in_place:
        model.compile(backend=backend, fullgraph=fullgraph)
        return model
    return torch.compile(model, backend=backend, fullgraph=fullgraph)
