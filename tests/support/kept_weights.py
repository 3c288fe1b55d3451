"""A cell that keeps its weights in other ways than torch's, its adapter, and the same regularization by hand."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.nn.utils import prune
from torch.nn.utils.parametrize import register_parametrization

import regkit
from regkit import Adapter, Output, Weight
from regkit.activity import of_step
from tests.support.loops import Batches
from tests.support.wrapped import Sinh

FEATURES, UNITS = 3, 4
WIDTH = FEATURES + UNITS
COLUMNS = {"kernel": (0, FEATURES), "recurrent": (FEATURES, WIDTH)}
GATES = ("forget", "new")


class Kept(nn.Module):
    """A cell of two gates, f and n, of [x, h]. All its weights are in one matrix of a submodule's."""

    def __init__(self, transposed: bool = False, masked: bool = False, positive: bool = False) -> None:
        super().__init__()
        self.transposed = transposed
        self.maps = nn.Module()
        shape = (WIDTH, 2 * UNITS) if transposed else (2 * UNITS, WIDTH)
        self.maps.w = nn.Parameter(torch.randn(shape) * 0.4)
        self.gain = nn.Parameter(torch.ones(1, UNITS))
        self.squash = nn.Softplus(beta=2) if positive else None
        self.register_buffer("wiring", (torch.rand(shape) > 0.3).float() if masked else None)

    def acting(self) -> Tensor:
        """What acts: (2 · units, features + units)."""
        w = pruned(self) if hasattr(self.maps, "w_orig") else self.maps.w
        w = w if self.squash is None else softplus(w, beta=2)
        w = w if self.wiring is None else w * self.wiring
        return w.T if self.transposed else w

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        f, n = (torch.cat([x, h], 1) @ self.acting().T).chunk(2, -1)
        f = f.sigmoid()
        return f * h + (1 - f) * self.gain * n.tanh()


class Pair(nn.Module):
    """Two cells, the second of which has the first's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Kept(transposed=True), Kept(transposed=True)
        self.two.maps.w = self.one.maps.w


class Reader(Adapter):
    modules = (Kept,)
    gates = GATES
    roles = ("kernel", "recurrent", "gain", "output")
    steps = True

    def weights(self, module: Kept) -> Iterator[Weight]:
        for role, columns in COLUMNS.items():
            yield Weight(
                ("maps.w",), role, gates=GATES, transposed=module.transposed, columns=columns,
                through=None if module.squash is None else "squash", mask=None if module.wiring is None else "wiring",
            )  # fmt: skip
        yield Weight(("gain",), "gain", transposed=True, columns=0)

    def outputs(self, module: nn.Module) -> Sequence[Output]:
        return [Output("output", sequence=True)]

    def observe(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> Mapping[str, Any]:
        return {"output": result, "before": args[1]}

    def segments(self, module: Any, site: Any, observed: Mapping[str, Any], valid: Any, step: int) -> Sequence[Any]:
        return [of_step(observed["output"], observed["before"], valid, step)]


def registry_of(*adapters: Adapter) -> regkit.Registry:
    plugin = types.ModuleType("stranger")
    plugin.regkit_adapters = regkit.hookimpl(lambda: list(adapters))
    return regkit.Registry([plugin])


REGISTRY = registry_of(Reader())
HOW = {
    "side by side": {},
    "turned": {"transposed": True},
    "wired": {"masked": True},
    "positive": {"positive": True},
    "all of it": {"transposed": True, "masked": True, "positive": True},
}


def pruned(model: Kept) -> Tensor:
    return model.maps.w_orig * model.maps.w_mask


def make(how: str, under: str = "plain") -> Kept:
    torch.manual_seed(1)
    model = Kept(**HOW[how]).double()
    if under == "parametrized":
        register_parametrization(model.maps, "w", Sinh())
    elif under == "pruned":
        torch.manual_seed(2)
        prune.random_unstructured(model.maps, "w", 0.3)
    return model


def part(w: Tensor, role: str, gate: str | None) -> Tensor:
    rows = slice(None) if gate is None else slice(GATES.index(gate) * UNITS, (GATES.index(gate) + 1) * UNITS)
    return w[rows, slice(*COLUMNS[role])]


def put(model: Kept, acting: Tensor) -> None:
    """By hand: change what is kept so that this acts, but for what a mask takes out."""
    wanted = acting.T if model.transposed else acting
    if model.squash is not None:
        wanted = torch.log(torch.expm1(2 * wanted)) / 2
    leaf = next(model.maps.parameters())
    masks = [mask.bool() for mask in (model.wiring, getattr(model.maps, "w_mask", None)) if mask is not None]
    new = wanted.asinh() if hasattr(model.maps, "parametrizations") else wanted
    for mask in masks:
        new = torch.where(mask, new, leaf)
    leaf.copy_(new)


def run(model: Kept, x: Tensor) -> Tensor:
    h, hs = torch.zeros(x.size(1), UNITS, dtype=x.dtype), []
    for step in x:
        h = model(step, h)
        hs.append(h)
    return torch.stack(hs)


def rules(via: str, role: str, gate: str | None) -> dict[str, Any]:
    target = {"role": role} if gate is None else {"role": role, "gate": gate}
    if via == "constraint":
        return {"rules": [{"name": "it", "target": target, "constraint": "max_norm(0.3)"}]}
    return {"rules": [{"name": "it", "target": target, "penalty": "l2(0.05)", "via": via}]}


def train(model: Kept, batches: Batches, extra=None, before=None, after=None, lr: float = 0.3) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for x, _ in batches:
        optimizer.zero_grad()
        loss = (run(model, x) - 0.3).square().mean() * 10
        (loss if extra is None else loss + extra()).backward()
        for act in (before, optimizer.step, after):
            if act is not None:
                with torch.no_grad():
                    act()


def changed(model: Kept, role: str, gate: str | None, change) -> None:
    acting = model.acting().clone()
    block = part(acting, role, gate)
    block.copy_(change(block))
    put(model, acting)


def ball(block: Tensor) -> Tensor:
    return block * (0.3 / block.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1)
