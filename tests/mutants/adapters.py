"""Adapters that are wrong on purpose, each in one way, with the law that has to catch it and what it has to say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from regkit_standard.torch_adapters import CellAdapter, SequenceAdapter
from torch import nn

from regkit import Adapter, Example, Output, Weight

SEQUENCE, CELL = SequenceAdapter(), CellAdapter()


def like(adapter, make, **changes):
    """The adapter's own example, of another module."""
    return replace(adapter.examples()[0], make=make, **changes)


LSTM = like(SEQUENCE, lambda: nn.LSTM(3, 4))
STACKED = like(SEQUENCE, lambda: nn.LSTM(3, 4, 2, bidirectional=True))
BATCH_FIRST = like(SEQUENCE, lambda: nn.LSTM(3, 4, batch_first=True))
GRU = like(SEQUENCE, lambda: nn.GRU(3, 4))
LSTM_CELL = like(CELL, lambda: nn.LSTMCell(3, 4))
GRU_CELL = like(CELL, lambda: nn.GRUCell(3, 4))


@dataclass(frozen=True)
class Mutant:
    """A wrong adapter. law: that catches it; words: a pattern that what was seen has to have in it."""

    adapter: Adapter
    example: Example
    law: str
    words: str


MUTANTS: dict[str, Mutant] = {}


def mutant(example: Example, law: str, words: str) -> Callable[[type[Adapter]], type[Adapter]]:
    def added(cls: type[Adapter]) -> type[Adapter]:
        MUTANTS[cls.__name__] = Mutant(cls(), example, law, words)
        return cls

    return added


# --- what it says ----------------------------------------------------------------------------------------------------


@mutant(LSTM, "modules_name_the_classes", "none of them: it is torch.nn.modules.rnn:LSTM")
class OfAnotherClass(SequenceAdapter):
    modules = (nn.GRU,)


@mutant(LSTM, "modules_name_the_classes", "not a tuple of classes")
class OneClassWithoutATuple(SequenceAdapter):
    modules = nn.LSTM


@mutant(GRU, "weights_are_well_formed", r"the unknown role 'readout'.* \(in its `roles`\)")
class UndeclaredRole(SequenceAdapter):
    def weights(self, module):
        yield from super().weights(module)
        yield Weight(("weight_hr_l0",), "readout")


@mutant(LSTM, "weights_are_well_formed", r"weight_ih_l0' unknown gate 'input'.* \(in its `gates`\)")
class UndeclaredGates(SequenceAdapter):
    gates = ("reset", "update", "new")


@mutant(LSTM, "weights_are_well_formed", r"the gates \['input', .*\]: input should be a valid tuple")
class GatesInAList(SequenceAdapter):
    def weights(self, module):
        return [replace(one, gates=list(one.gates)) for one in super().weights(module)]


@mutant(LSTM, "weights_are_well_formed", "the layer -1; layers are counted from 0")
class LayersFromTheTop(SequenceAdapter):
    def weights(self, module):
        return [replace(one, layer=one.layer - module.num_layers) for one in super().weights(module)]


@mutant(STACKED, "weights_are_well_formed", "the direction 'reverse', not forward or backward")
class TorchsOwnWordForBackward(SequenceAdapter):
    def weights(self, module):
        for one in super().weights(module):
            yield replace(one, direction="reverse" if one.direction == "backward" else one.direction)


@mutant(LSTM, "weights_are_well_formed", "something else at its second call")
class WeightsThatRunOut(SequenceAdapter):
    def __init__(self):
        self.once = {}

    def weights(self, module):
        return self.once.setdefault("weights", super().weights(module))


@mutant(LSTM, "outputs_are_well_formed", "one role twice: .*'cell'")
class OneRoleTwice(SequenceAdapter):
    def outputs(self, module):
        return [*super().outputs(module), Output("cell")]


@mutant(LSTM, "outputs_are_well_formed", r"\['output'\] are of weights, and of outputs too")
class AWeightCalledOutput(SequenceAdapter):
    def weights(self, module):
        return [replace(one, role="output" if one.role == "bias" else one.role) for one in super().weights(module)]


@mutant(LSTM, "roles_are_spelt_as_everywhere", "'recurent'; did you mean 'recurrent'")
class RoleMisspelt(SequenceAdapter):
    roles = ("kernel", "recurent", "bias", "output", "state", "cell")

    def weights(self, module):
        return [replace(one, role=one.role.replace("rr", "r")) for one in super().weights(module)]


@mutant(LSTM, "regkit_can_bind_every_weight", "weight_xh_l0 is missing")
class ParameterMisspelt(SequenceAdapter):
    def weights(self, module):
        for one in super().weights(module):
            yield replace(one, parameters=tuple(name.replace("_ih_", "_xh_") for name in one.parameters))


@mutant(LSTM, "regkit_can_bind_every_weight", "16 rows, which do not divide into 3 gates: input, forget, cell")
class OneGateTooFew(SequenceAdapter):
    def weights(self, module):
        return [replace(one, gates=one.gates[:3]) for one in super().weights(module)]


# --- weights ---------------------------------------------------------------------------------------------------------


@mutant(STACKED, "every_weight_is_covered_once", "weight_ih_l0_reverse .* is covered by no weight")
class OneDirectionForgotten(SequenceAdapter):
    def weights(self, module):
        return [one for one in super().weights(module) if one.direction == "forward"]


@mutant(STACKED, "every_weight_is_covered_once", "weight_ih_l1 .* is covered by no weight")
class SecondLayerForgotten(SequenceAdapter):
    def weights(self, module):
        return [one for one in super().weights(module) if one.layer == 0]


@mutant(GRU_CELL, "every_weight_is_covered_once", r"bias_ih \(12,\) is covered by no weight")
class BiasForgotten(CellAdapter):
    def weights(self, module):
        return [one for one in super().weights(module) if one.role != "bias"]


@mutant(LSTM, "every_weight_is_covered_once", "weight_hh_l0 is covered more than once: .*, .*recurrent")
class CoveredTwice(SequenceAdapter):
    def weights(self, module):
        return [*super().weights(module), Weight(("weight_hh_l0",), "recurrent")]


@mutant(LSTM, "every_weight_is_covered_once", "16 of the 64 numbers of weight_hh_l0 are covered by no weight")
class AColumnForgotten(SequenceAdapter):
    def weights(self, module):
        return [replace(w, columns=(1, 4)) if w.role == "recurrent" else w for w in super().weights(module)]


@mutant(GRU, "l2_is_weight_decay", "weight_ih_l0 is .* away from where weight_decay brings it")
class ColumnsThatOverlap(SequenceAdapter):
    def weights(self, module):
        for one in super().weights(module):
            if one.role == "kernel":
                yield replace(one, columns=(0, 2))
                yield replace(one, columns=(1, 3))
            else:
                yield one


class _Swapped:
    def weights(self, module):
        other = {"kernel": "recurrent", "recurrent": "kernel"}
        return [replace(one, role=other.get(one.role, one.role)) for one in super().weights(module)]


@mutant(LSTM, "kernels_act_on_the_input", "weight_hh_l0 .* changes nothing at the first step.* is it recurrent")
class KernelAndRecurrentSwapped(_Swapped, SequenceAdapter):
    pass


@mutant(GRU_CELL, "recurrent_weights_act_on_the_state", "weight_ih .* acts at the first step.* is it a kernel")
class KernelAndRecurrentSwappedInACell(_Swapped, CellAdapter):
    pass


@mutant(LSTM, "biases_act_alone", "weight_hh_l0 .* changes nothing where the input is zeros")
class RecurrentCalledBias(SequenceAdapter):
    def weights(self, module):
        return [replace(one, role="bias" if one.role == "recurrent" else one.role) for one in super().weights(module)]


class Leftover(nn.GRU):
    """A GRU with a parameter that nobody uses any more."""

    def __init__(self) -> None:
        super().__init__(3, 4)
        self.attention = nn.Parameter(torch.randn(4, 4))


@mutant(like(SEQUENCE, Leftover), "every_weight_acts", r"attention \(projection\) changes nothing")
class WhatDoesNothing(SequenceAdapter):
    def weights(self, module):
        return [*super().weights(module), Weight(("attention",), "projection")]


@mutant(GRU, "pairs_of_biases_act_as_their_sum", r"from bias_ih_l0 to bias_hh_l0 in the gate 'new' changes the output")
class PairWithoutSeparate(SequenceAdapter):
    def weights(self, module):
        return [replace(one, separate=()) for one in super().weights(module)]


@mutant(GRU, "pairs_of_biases_act_as_their_sum", "separate has 'reset', but there the sum of .* is what acts")
class TooMuchSeparate(SequenceAdapter):
    def weights(self, module):
        return [replace(one, separate=("reset", "new")) if one.separate else one for one in super().weights(module)]


@mutant(LSTM, "pairs_of_biases_act_as_their_sum", "bias_hh_l0 act as their sum, and are not given as a pair")
class PairForgotten(SequenceAdapter):
    def weights(self, module):
        return [one for one in super().weights(module) if len(one.parameters) == 1]


# --- gates, layers, directions ---------------------------------------------------------------------------------------


class _OtherOrder(SequenceAdapter):
    """One whose gates come in another order."""

    def weights(self, module):
        order = {"reset": "update", "update": "reset", "forget": "cell", "cell": "forget"}
        return [replace(w, gates=tuple(order.get(g, g) for g in w.gates)) for w in super().weights(module)]


@mutant(LSTM, "gates_are_those_of_the_equations", "rows 4 to 7 .* given as the gate 'cell', .* move forget")
class WrongGateOrder(_OtherOrder):
    pass


@mutant(replace(GRU, equations=None), "gates_are_those_of_the_equations", "which is which: give equations=")
class NoEquations(SequenceAdapter):
    pass


def keras_equations(module, x, h, layer, direction):
    """A GRU whose first rows are the update gate, as in Keras."""
    a, b = x @ module.weight_ih_l0.T + module.bias_ih_l0, h[0] @ module.weight_hh_l0.T + module.bias_hh_l0
    (a_z, a_r, a_n), (b_z, b_r, b_n) = a.chunk(3, -1), b.chunk(3, -1)
    r, z = (a_r + b_r).sigmoid(), (a_z + b_z).sigmoid()
    n = torch.tanh(a_n + r * b_n)
    return {"reset": r, "update": z, "new": n}, ((1 - z) * n + z * h[0],)


@mutant(replace(GRU, equations=keras_equations), "equations_are_the_modules_own", "is off by .* from what the module")
class WrongGateOrderInTheEquationsToo(_OtherOrder):
    pass


@mutant(
    STACKED,
    "layers_and_directions_are_those_of_the_equations",
    "weight_ih_l0 .* layer 0, .* said to be in 1",
)
class LayersUpsideDown(SequenceAdapter):
    def weights(self, module):
        return [replace(one, layer=module.num_layers - 1 - one.layer) for one in super().weights(module)]


@mutant(
    STACKED,
    "layers_and_directions_are_those_of_the_equations",
    "weight_ih_l0 .* forward, .* said to be .* backward",
)
class DirectionsExchanged(SequenceAdapter):
    def weights(self, module):
        other = {"forward": "backward", "backward": "forward"}
        return [replace(one, direction=other[one.direction]) for one in super().weights(module)]
