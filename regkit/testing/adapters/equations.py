"""Laws of gates, layers and directions: a rule reaches the gate that the module's own equations call by that name.

The equations are the author's, apart from the adapter. They are first held to the module itself: equations that compute
what it computes cannot have its gates in another order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regkit.adapters import Equations, Weight
from regkit.testing.adapters.case import Case, Parts, gradients_of, listed, map_state, output_of, true_on_error
from regkit.testing.adapters.weights import has_effect, title
from regkit.testing.laws import Laws, hold

EQUATIONS: Laws[Case] = Laws()

_BATCH = 8

Place = tuple[int, str]
"""A layer and a direction."""


@dataclass(frozen=True)
class Walk:
    """The outputs and states of a module over a sequence, by its equations.

    out: (time, batch, features).
    states: in the order of time, by layer and direction.
    last: the input and the state before the step that is computed last, by layer and direction.
    """

    out: Tensor
    states: Mapping[Place, list[Any]]
    last: Mapping[Place, tuple[Tensor, Any]]


def has_equations(case: Case) -> bool:
    """Whether the example gives equations."""
    return case.example.equations is not None


def has_gates(case: Case) -> bool:
    """Whether any weight has gates."""
    return any(weight.gates for weight in case.weights(case.module()))


def _equations(case: Case) -> Equations:
    hold(has_equations(case), "the weights have gates, and the example does not say which is which: give equations=")
    assert case.example.equations is not None
    return case.example.equations


def walk(case: Case, module: nn.Module, x: Tensor) -> Walk:
    """Follow the equations through every layer and direction."""
    equations = _equations(case)
    here = {(weight.layer, weight.direction) for weight in case.weights(module)}
    states: dict[Place, list[Any]] = {}
    last: dict[Place, tuple[Tensor, Any]] = {}
    for layer in sorted({layer for layer, _ in here}):
        halves = []
        for direction in ("forward", "backward"):
            if (layer, direction) not in here:
                continue
            h, found = case.start(module, x.size(1)), []
            for step in x.flip(0) if direction == "backward" else x:
                last[layer, direction] = step, h
                _, h = equations(module, step, h, layer, direction)
                found.append(h)
            states[layer, direction] = found[::-1] if direction == "backward" else found
            halves.append(torch.stack([output_of(h) for h in states[layer, direction]]))
        x = torch.cat(halves, -1)
    return Walk(x, states, last)


@EQUATIONS.add(true_on_error(has_equations))
def equations_are_the_modules_own(case: Case) -> None:
    """The equations tell which gate is which, and must be the module's own: step by step, layer by layer, their outputs
    are the module's.
    """
    module, x = case.module(), case.inputs()
    with torch.no_grad():
        said, out = walk(case, module, x).out, case.run(module, x)
    hold(said.shape == out.shape, f"the equations put out {tuple(said.shape)}, the module {tuple(out.shape)}")
    off = float((said - out).abs().max())
    hold(off < 1e-9, f"what the equations put out is off by {off:.2g} from what the module does")


def _gate_gradients(module: nn.Module, gates: Mapping[str, Tensor], gate: str) -> Parts:
    """The gradient of a gate by each parameter, the other gates held fixed."""
    others = [one for name, one in gates.items() if name != gate]
    held = [one.register_hook(_nothing) for one in others]  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    try:
        return gradients_of(gates[gate].sum(), module, retain_graph=True)
    finally:
        for handle in held:
            handle.remove()


def _nothing(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else torch.zeros_like(gradient)


@EQUATIONS.add(true_on_error(has_gates))
def gates_are_those_of_the_equations(case: Case) -> None:
    """A rule on a gate acts on the rows of that gate in each weight, as found by regkit. Name the gates in the order
    in which they are stacked. In the equations, let a gate that enters another be the very tensor that is returned.
    """
    module = case.module()
    equations, places = _equations(case), walk(case, module, case.inputs(batch=_BATCH)).last
    weights = [(number, weight) for number, weight in enumerate(case.singles(module)) if weight.gates]
    for place, (x, h) in places.items():
        gates, _ = equations(module, x.detach(), map_state(Tensor.detach, h), *place)
        moved = {gate: _gate_gradients(module, gates, gate) for gate in gates}
        for number, weight in weights:
            if (weight.layer, weight.direction) == place:
                _check_gates(case, number, weight, moved)


def _check_gates(case: Case, number: int, weight: Weight, moved: Mapping[str, Parts]) -> None:
    for gate in weight.gates:
        hold(gate in moved, f"{title(weight)} has the gate {gate!r}, and the equations give only {listed(moved)}")
        block = case.blocks[number, gate]
        there = any(bool(marked.any()) for marked in block.values())
        hold(there, f"a rule on the gate {gate!r} of {title(weight)} does nothing")
        reached = [name for name, effects in moved.items() if has_effect(effects, block)]
        rows = _rows(block, weight)
        hold(reached, f"{rows} of {title(weight)} are given as the gate {gate!r}, and move no gate of the equations")
        hold(
            reached == [gate],
            f"{rows} of {title(weight)} are given as the gate {gate!r}, and in the equations move {listed(reached)}",
        )
        whole = all(bool((moved[gate][name][marked] != 0).all()) for name, marked in block.items())
        hold(whole, f"{rows} of {title(weight)} are given as the gate {gate!r}, and not all of them move it")


def _rows(block: Parts, weight: Weight) -> str:
    """The rows of a block, in the orientation that kinds see: `rows 0 to 3`."""
    (marked,) = [marked for marked in block.values() if bool(marked.any())]
    found = marked.nonzero()[:, 1 if weight.transposed else 0]
    return f"rows {int(found.min())} to {int(found.max())}"


@EQUATIONS.add(true_on_error(has_equations))
def layers_and_directions_are_those_of_the_equations(case: Case) -> None:
    """A rule on a layer or a direction acts on the weights that are there. Count layers from the input, from 0; in the
    backward direction time runs the other way.
    """
    module = case.module()
    equations, places = _equations(case), walk(case, module, case.inputs(batch=_BATCH)).last
    for place, (x, h) in places.items():
        _, new = equations(module, x.detach(), map_state(Tensor.detach, h), *place)
        effects = gradients_of(output_of(new).square().sum(), module)
        for number, weight in enumerate(case.singles(module)):
            inside, said = has_effect(effects, case.blocks[number, None]), (weight.layer, weight.direction)
            where = f"in layer {place[0]}, {place[1]}, of the equations"
            hold(inside or said != place, f"{title(weight)} is said to be, and is not, {where}")
            hold(not inside or said == place, f"{title(weight)} is {where}, and said to be in {said[0]}, {said[1]}")
