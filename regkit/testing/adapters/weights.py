"""Laws of weights: each is covered once, and has the role of the weight in the module's own mathematics."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Final

import torch
from torch import Tensor, nn

from regkit.adapters import Weight
from regkit.testing.adapters.case import Case, Parts, gradients_of, listed, seeded, trained_parameters
from regkit.testing.laws import Laws, hold

WEIGHTS: Laws[Case] = Laws()

_MOVE: Final = 0.5


def effects_on_output(case: Case, module: nn.Module, x: Tensor) -> Parts:
    """The gradient of a random sum of the module's output over x, by each parameter."""
    out = case.run(module, x)
    with seeded(3):
        return gradients_of((out * torch.randn_like(out)).sum(), module)


def has_effect(effects: Parts, block: Parts) -> bool:
    """Whether any element of a block has an effect."""
    return any(bool((effects[name][marked] != 0).any()) for name, marked in block.items())


def title(weight: Weight) -> str:
    """A weight, for a sentence: `weight_hh_l0 (recurrent)`."""
    return f"{' + '.join(weight.parameters)} ({weight.role})"


def ignored(case: Case, names: Iterable[str]) -> set[str]:
    """The names that the adapter or the example declares ignored. Raises Broken for an example's glob for none."""
    names = list(names)
    found = {name for name in names if any(fnmatchcase(name, glob) for glob in case.adapter.ignored)}
    for glob in case.example.ignored:
        numbers = {name for name in names if fnmatchcase(name, glob)}
        hold(numbers, f"ignored has {glob!r}, and the module has no such parameter. It has: {listed(names)}")
        found |= numbers
    return found


def weights_covering(case: Case, weights: Sequence[Weight], name: str) -> list[int]:
    """The numbers of the weights that reach a parameter."""
    return [number for number in range(len(weights)) if bool(case.blocks[number, None][name].any())]


def masked_out(case: Case, module: nn.Module) -> Parts:
    """The numbers of each parameter that a mask takes out: no weight reaches these numbers, and none acts."""
    effects, weights = effects_on_output(case, module, case.inputs()), case.singles(module)
    found = {}
    for name, effects_of in effects.items():
        numbers = weights_covering(case, weights, name)
        reached = sum((case.blocks[number, None][name] for number in numbers), start=torch.zeros_like(effects_of)) > 0
        found[name] = ~reached & (effects_of == 0) & any(weights[number].mask is not None for number in numbers)
    return found


@WEIGHTS.add()
def every_weight_is_covered_once(case: Case) -> None:
    """A rule without a role acts on every weight, each once. Give each parameter of the module, of every layer and
    direction; where it holds two weights, give the columns of each; say in `ignored` what no rule is to reach.
    """
    module = case.module()
    parameters, weights = trained_parameters(module), case.singles(module)
    left_out, out = ignored(case, parameters), masked_out(case, module)
    for name, parameter in parameters.items():
        numbers = weights_covering(case, weights, name)
        times = sum((case.blocks[number, None][name].long() for number in numbers), start=out[name].long())
        titles = listed(title(weights[number]) for number in numbers)
        if name in left_out:
            hold(not numbers, f"{name} is declared ignored, and covered: {titles}")
            continue
        hold(numbers, f"{name} {tuple(parameter.shape)} is covered by no weight of the adapter")
        hold(times.max() <= 1, f"{name} is covered more than once: {titles}")
        missing = int((times == 0).sum())
        hold(not missing, f"{missing} of the {parameter.numel()} numbers of {name} are covered by no weight: {titles}")


def _weights_of_role(case: Case, module: nn.Module, role: str) -> list[tuple[int, Weight]]:
    return [(number, weight) for number, weight in enumerate(case.singles(module)) if weight.role == role]


@WEIGHTS.add()
def kernels_act_on_the_input(case: Case) -> None:
    """The input is multiplied by the kernel, which acts at the first step, from a state of zeros; the kernel of the
    first layer has a column for each feature. Give the weights of the state the role `recurrent`.
    """
    module = case.module()
    effects = effects_on_output(case, module, case.inputs(time=1))
    for number, weight in _weights_of_role(case, module, "kernel"):
        hold(
            has_effect(effects, case.blocks[number, None]),
            f"{title(weight)} changes nothing at the first step, from a state of zeros: is it recurrent?",
        )
        shape, features = case.shapes[number], case.example.features
        fits = weight.layer > 0 or len(shape) != 2 or shape[1] == features
        hold(fits, f"{title(weight)} has {shape[-1]} columns, and the input {features} features")


@WEIGHTS.add()
def recurrent_weights_act_on_the_state(case: Case) -> None:
    """The state before is multiplied by the recurrent weights, which from a state of zeros do nothing at the first
    step, and something at the second. Give the weights of the input the role `kernel`.
    """
    module = case.module()
    once, twice = (effects_on_output(case, module, case.inputs(time=time)) for time in (1, 2))
    for number, weight in _weights_of_role(case, module, "recurrent"):
        block = case.blocks[number, None]
        hold(
            not has_effect(once, block) or _between_units(case, number, weight),
            f"{title(weight)} acts at the first step, where the state is zeros: is it a kernel?",
        )
        hold(has_effect(twice, block), f"{title(weight)} does nothing at the second step, where the state is not zeros")


def _between_units(case: Case, number: int, weight: Weight) -> bool:
    """Whether a weight goes from units to units, and cannot be of the input: such a one may act at rest, as synapses
    do that a state of zeros does not close.
    """
    rows, *columns = case.shapes[number]
    return weight.layer == 0 and columns == [rows // (len(weight.gates) or 1)] and columns != [case.example.features]


@WEIGHTS.add()
def biases_act_alone(case: Case) -> None:
    """A bias is a vector that acts whatever the input and the state are. Give weights that multiply another role:
    constraints leave biases out unless they are asked for.
    """
    module = case.module()
    effects = effects_on_output(case, module, torch.zeros_like(case.inputs(time=1)))
    for number, weight in _weights_of_role(case, module, "bias"):
        hold(
            has_effect(effects, case.blocks[number, None]), f"{title(weight)} changes nothing where the input is zeros"
        )
        shape = case.shapes[number]
        hold(len(shape) == 1, f"{title(weight)} has the shape {shape}, and is no vector")


@WEIGHTS.add()
def every_weight_acts(case: Case) -> None:
    """A rule on a weight without effect has no effect. Give only weights with which the module computes."""
    module = case.module()
    effects = effects_on_output(case, module, case.inputs())
    for number, weight in enumerate(case.singles(module)):
        hold(
            has_effect(effects, case.blocks[number, None]), f"{title(weight)} changes nothing that the module puts out"
        )


@WEIGHTS.add()
def pairs_of_biases_act_as_their_sum(case: Case) -> None:
    """`"bias": "effective"` penalizes a + b as one bias. Give two biases as a pair once more where moving
    something from one to the other changes nothing, and name the gates where it does in `separate`.
    """
    module = case.module()
    weights = case.singles(module)
    number_of = {weight.parameters[0]: number for number, weight in enumerate(weights)}
    pairs = {weight.parameters: weight for weight in case.weights(module) if len(weight.parameters) == 2}
    for names, pair in pairs.items():
        alone = [name for name in names if name not in number_of]
        hold(not alone, f"{title(pair)} is given as a pair, but {listed(alone)} not on its own too")
        for gate in pair.gates or (None,):
            apart, where = gate in pair.separate, "" if gate is None else f" in the gate {gate!r}"
            moves = _moving_changes_output(case, [case.blocks[number_of[name], gate] for name in names])
            hold(
                apart or not moves,
                f"what is moved from {names[0]} to {names[1]}{where} changes the output: their sum is not what acts "
                f"there, and separate is {pair.separate}",
            )
            hold(not apart or moves, f"separate has {gate!r}, but there the sum of {' and '.join(names)} is what acts")
    paired = {name for names in pairs for name in names}
    biases = [
        (number, one) for number, one in _weights_of_role(case, module, "bias") if one.parameters[0] not in paired
    ]
    for at, (number, one) in enumerate(biases):
        for other_number, other in biases[at + 1 :]:
            blocks = [case.blocks[number, None], case.blocks[other_number, None]]
            if _sizes(blocks[0]) == _sizes(blocks[1]):
                names = (one.parameters[0], other.parameters[0])
                hold(
                    _moving_changes_output(case, blocks),
                    f"{names[0]} and {names[1]} act as their sum, and are not given as a pair",
                )


def _sizes(block: Parts) -> list[int]:
    return [count for marked in block.values() if (count := int(marked.sum()))]


def _moving_changes_output(case: Case, blocks: list[Parts]) -> bool:
    """Whether the output changes where something is moved from one block to another of equal size."""
    module, x = case.module(), case.inputs()
    parameters = trained_parameters(module)
    with torch.no_grad():
        before = case.run(module, x)
        for block, move in zip(blocks, (-_MOVE, _MOVE), strict=True):
            for name, marked in block.items():
                parameters[name][marked] += move
        return not torch.allclose(case.run(module, x), before, rtol=0, atol=1e-9)
