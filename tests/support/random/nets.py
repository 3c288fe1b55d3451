"""Random nets of recurrent modules, run in every way that people run them, that keep what each module puts out.

Modules come in several copies of one shape and in several shapes. What is data and what are neighbours is told by the
plan of the run alone (`Plan`), in the `sights` that a net keeps of its last pass.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.support.random.activity_interpreter import Pairs, Sight, sequence

FEATURES = 3
LAYERS = (nn.RNN, nn.LSTM, nn.GRU)
CELLS = (nn.RNNCell, nn.LSTMCell, nn.GRUCell)
LSTMS = (nn.LSTM, nn.LSTMCell)
LINKED = ("learned", "computed")
"""The starts that a gradient can reach, so that the first output has a neighbour."""
Around = Callable[[Any], AbstractContextManager[None]]
"""Makes the context of a call or a loop, of lengths or of a mask."""


@dataclass(frozen=True)
class Plan:
    """How a module is run.

    call: whole, packed, unbatched, twice, packed twice (the second time a sequence less), steps (a layer, one step of
    time a call), chunks (two).
    start: of its state: none, zeros, learned (a parameter), computed (from the input).
    hand: of the state to the next call: as it is, copied (h * 1.0), h copied (c as it is), detached, anew (from
    nothing in the middle of the loop), branching (all calls go on from the first one).
    by_name: whether a cell's state is a keyword.
    """

    call: str
    start: str
    hand: str
    by_name: bool


@dataclass
class Batch:
    """A padded batch.

    x: (time, batch, features); valid: (time, batch); packed: (batch,), lengths to pack with; padding: how regkit is
    told of `valid`: lengths, mask, or "" where all is data.
    """

    x: Tensor
    valid: Tensor
    packed: Tensor
    padding: str = ""
    lengths: Around = field(default=lambda _: nullcontext())
    mask: Around = field(default=lambda _: nullcontext())

    def around(self, mask: Tensor) -> AbstractContextManager[None]:
        """The context of a whole sequence, whose mask is laid out as its output."""
        return {"": nullcontext, "lengths": self.lengths, "mask": self.mask}[self.padding](mask)

    def around_step(self, mask: Tensor) -> AbstractContextManager[None]:
        """The context of one call of a cell."""
        return self.mask(mask) if self.padding == "mask" else nullcontext()


class RandomNet(nn.Module):
    """One to some nine recurrent modules, side by side, of which each also has a little of the outputs before it."""

    def __init__(self, r: Random, batch: int, smooth: bool, padding: str) -> None:
        super().__init__()
        self.plans: dict[str, Plan] = {}
        self.sights: list[Sight] = []
        self._before: dict[str, tuple[Tensor, ...]] = {}
        for _ in range(r.randint(1, 3)):
            make = _design(r, smooth)
            plan: Plan | None = None
            for _ in range(r.choice([1, 2, 3])):
                module = make().requires_grad_(r.random() < 0.9)
                if plan is None or r.random() < 0.3:
                    plan = _plan(r, isinstance(module, nn.RNNCellBase), batch, padding)
                self._add(module, plan, batch)

    def _add(self, module: nn.Module, plan: Plan, batch: int) -> None:
        name = f"{type(module).__name__.lower()}{len(self.plans)}"
        self.add_module(name, module)
        self.plans[name] = plan
        for number, size in enumerate(_sizes(module) if plan.start == "learned" else ()):
            shape = (size,) if plan.call == "unbatched" else (batch, size)
            if isinstance(module, nn.RNNBase):
                shape = (module.num_layers * (1 + module.bidirectional), *shape)
            self.register_parameter(f"{name}_start{number}", nn.Parameter(0.5 * torch.randn(shape)))

    def forward(self, batch: Batch, goes_on: bool = False) -> Tensor:
        """A loss of all outputs. goes_on: cells begin where they ended before, which still is in the graph."""
        self.sights, loss, x = [], batch.x.new_zeros(()), batch.x
        for name, plan in self.plans.items():
            module = self.get_submodule(name)
            run = self._run_cell if isinstance(module, nn.RNNCellBase) else self._run_layer
            for h in run(name, module, plan, batch, x, goes_on):
                loss = loss + h.to(x.dtype).square().mean()
                x = x + 0.1 * h.to(x.dtype).mean()
        return loss

    def _start(self, name: str, module: nn.Module, plan: Plan, x: Tensor) -> tuple[Tensor, ...] | None:
        """The state that a cell's loop begins with, h and c."""
        if plan.start == "none":
            return None
        if plan.start == "learned":
            return tuple(self.get_parameter(f"{name}_start{number}") for number in range(len(_sizes(module))))
        some = torch.zeros_like(x[0]) if plan.start == "zeros" else x[0].cos()
        return tuple(some[..., :1].expand(*some.shape[:-1], size) * 1.0 for size in _sizes(module))

    def _run_cell(self, name: str, cell: nn.Module, plan: Plan, batch: Batch, x: Tensor, goes_on: bool) -> list[Tensor]:
        alone = plan.call == "unbatched"
        x = x[:, 0] if alone else x
        state, linked = self._start(name, cell, plan, x), plan.start in LINKED
        if goes_on and name in self._before:
            state, linked = self._before[name], plan.hand != "detached"
        found: list[Tensor] = []
        with batch.around(batch.valid) if batch.padding == "lengths" else nullcontext():
            for time, now in enumerate(x):
                if plan.hand == "anew" and time == 2 and not batch.padding:
                    state, linked = None, False
                with batch.around_step(batch.valid[time]):
                    new = _step(cell, now, state, plan.by_name)
                valid = batch.valid[time], batch.valid[max(time - 1, 0)]
                self._keep_step(name, new, state if linked else None, valid, alone)
                found.append(new[0])
                if plan.hand != "branching" or time == 0:
                    state, linked = _handed(new, plan.hand), plan.hand != "detached"
        self._before[name] = state or ()
        return found

    def _keep_step(
        self, name: str, new: tuple[Tensor, ...], before: tuple[Tensor, ...] | None, valid: Pairs, alone: bool
    ) -> None:
        now, both = valid[0], valid[0] & valid[1]
        for number, role in enumerate(("output", "cell")[: len(new)]):
            h, previous = new[number], None if before is None else before[number]
            if alone:
                h, previous = h[None], None if previous is None else previous[None]
            pairs = None if previous is None else (h[both], previous[both])
            self.sights.append(Sight(name, role, h[now], h.size(0), pairs))

    def _run_layer(
        self, name: str, layer: nn.RNNBase, plan: Plan, batch: Batch, x: Tensor, goes_on: bool
    ) -> list[Tensor]:
        state, linked = self._start_of_layer(name, layer, plan, x), plan.start in LINKED
        if plan.call in ("steps", "chunks"):
            found = []
            for at, chunk in enumerate(x.split(1 if plan.call == "steps" else 2)):
                start = at * (1 if plan.call == "steps" else 2)
                out, state = self._call_layer(name, layer, plan, batch, chunk, state, linked, start)
                state, linked = _handed(state, plan.hand), plan.hand != "detached"
                found.append(out)
            return found
        found = [self._call_layer(name, layer, plan, batch, x, state, linked)[0]]
        if plan.call == "twice":
            shorter = x if batch.padding else x[: max(len(x) - 1, 1)]
            found.append(self._call_layer(name, layer, plan, batch, shorter.flip(0), state, linked)[0])
        if plan.call == "packed twice":
            less = max(x.size(1) - 1, 1)
            state = None if state is None else tuple(one[:, :less].contiguous() for one in state)
            found.append(self._call_layer(name, layer, plan, batch, x[:, :less].flip(0), state, linked)[0])
        return found

    def _start_of_layer(self, name: str, layer: nn.RNNBase, plan: Plan, x: Tensor) -> tuple[Tensor, ...] | None:
        """The state that a layer's first call is given, h and c."""
        if plan.start in ("none", "learned"):
            return self._start(name, layer, plan, x)
        wide = x[0, :, :1].cos() * (plan.start == "computed")
        wide = wide.expand(layer.num_layers * (1 + layer.bidirectional), -1, -1)
        wide = wide[:, 0] if plan.call == "unbatched" else wide
        wide = wide.detach() if plan.start == "zeros" else wide
        return tuple(wide.expand(*wide.shape[:-1], size).contiguous() for size in _sizes(layer))

    def _call_layer(
        self,
        name: str,
        layer: nn.RNNBase,
        plan: Plan,
        batch: Batch,
        x: Tensor,
        state: tuple[Tensor, ...] | None,
        linked: bool,
        start: int = 0,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        valid, first, alone = batch.valid[start : start + len(x)], layer.batch_first, plan.call == "unbatched"
        given = state if state is None or isinstance(layer, nn.LSTM) else state[0]
        if plan.call.startswith("packed"):
            lengths = batch.packed[: x.size(1)]
            packed, final = layer(pack_padded_sequence(x, lengths, enforce_sorted=False), given)
            out, lengths = pad_packed_sequence(packed)
            valid, loose = torch.arange(out.size(0))[:, None] < lengths, packed.data
        elif alone:
            with batch.around(valid[:, 0]):
                loose, final = layer(x[:, 0], hx=given)
            out = loose[:, None]
        else:
            with batch.around(valid.T if first else valid):
                loose, final = layer(x.transpose(0, 1) if first else x, given)
            out = loose.transpose(0, 1) if first else loose
        before = state[0] if state is not None and linked else None
        self._keep_sequence(name, layer, out, valid, before[:, None] if alone and before is not None else before, plan)
        final = final if isinstance(final, tuple) else (final,)
        self._keep_final(name, layer, final, alone)
        return loose, final

    def _keep_sequence(
        self, name: str, layer: nn.RNNBase, out: Tensor, valid: Tensor, before: Tensor | None, plan: Plan
    ) -> None:
        ways = 1 + layer.bidirectional
        for number, half in enumerate(out.chunk(ways, -1)):
            pairs: Pairs
            rows, pairs = sequence(half, valid, backward=number == 1)
            if before is not None:
                first = valid.sum(0) - 1 if plan.call.startswith("packed") else torch.tensor(len(valid) - 1)
                each = torch.arange(half.size(1))
                at = (first.expand(half.size(1)) if number == 1 else torch.zeros_like(each)), each
                kept = valid[at]
                added = half[at][kept], before[number - ways][kept]
                pairs = (torch.cat([pairs[0], added[0]]), torch.cat([pairs[1], added[1]]))
            direction = ("forward", "backward")[number]
            self.sights.append(Sight(name, "output", rows, out.size(1), pairs, layer.num_layers - 1, direction))

    def _keep_final(self, name: str, layer: nn.RNNBase, final: tuple[Tensor, ...], alone: bool) -> None:
        for role, states in zip(("state", "cell"), final, strict=False):
            for number, h in enumerate(states):
                level, back = divmod(number, 1 + layer.bidirectional)
                rows = h[None] if alone else h
                direction = ("forward", "backward")[back]
                self.sights.append(Sight(name, role, rows, rows.size(0), None, level, direction))


def _sizes(module: nn.Module) -> list[int]:
    """The features of each tensor of a state."""
    hidden = module.hidden_size
    return [getattr(module, "proj_size", 0) or hidden, hidden][: 2 if isinstance(module, LSTMS) else 1]


def _step(cell: nn.Module, x: Tensor, state: tuple[Tensor, ...] | None, by_name: bool) -> tuple[Tensor, ...]:
    if state is None:
        new = cell(x)
    else:
        given = state if isinstance(cell, nn.LSTMCell) else state[0]
        new = cell(x, hx=given) if by_name else cell(x, given)
    return new if isinstance(new, tuple) else (new,)


def _handed(state: tuple[Tensor, ...], how: str) -> tuple[Tensor, ...]:
    if how == "copied":
        return tuple(one * 1.0 for one in state)
    if how == "h copied":
        return (state[0] * 1.0, *state[1:])
    return tuple(one.detach() for one in state) if how == "detached" else state


def _design(r: Random, smooth: bool) -> Callable[[], nn.Module]:
    """A maker of modules of one shape."""
    hidden = r.choice([2, 4])
    if r.random() < 0.5:
        cell = r.choice(CELLS)
        return lambda: cell(FEATURES, hidden)
    layer = r.choice(LAYERS)
    options: dict[str, Any] = {"batch_first": r.random() < 0.5}
    if r.random() < 0.4:
        options["bidirectional"] = True
    if r.random() < 0.3:
        options["num_layers"] = 2
    if layer is nn.LSTM and hidden == 4 and r.random() < 0.5:
        options["proj_size"] = 2
    if layer is nn.RNN and not smooth and r.random() < 0.3:
        options["nonlinearity"] = "relu"
    return lambda: layer(FEATURES, hidden, **options)


def _plan(r: Random, cell: bool, batch: int, padding: str) -> Plan:
    """padding: with a mask, each call of a cell has its own, and all are one chain from the first on; lengths are those
    of a whole sequence, which a layer must be given at once.
    """
    alone = ["unbatched"] if batch == 1 else []
    if not cell:
        loops = [] if padding == "lengths" else ["steps", "chunks"]
        call = r.choice(["whole", "whole", "packed", "packed twice", "twice", *alone, *loops])
        hand = r.choice(["as it is", "copied", "detached"]) if call in ("steps", "chunks") else ""
        return Plan(call, r.choice(["none", "zeros", "learned", "computed"]), hand, False)
    branching = [] if padding == "mask" else ["branching"]
    start = r.choice(["none", "none", "zeros", "learned", "computed"])
    hand = r.choice(["as it is", "as it is", "copied", "h copied", "detached", "anew", *branching])
    return Plan(r.choice(["whole", *alone]), start, hand, r.random() < 0.3)
