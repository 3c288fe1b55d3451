"""Adapters, which describe classes of recurrent modules.

An adapter lists a module's weights (role, layer, direction, the gates stacked in the rows) and outputs. From these,
`regkit.resolve` makes sites: a `WeightSite` is a block of rows of one weight, an `OutputSite` one output of a module.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from regkit import _pickled
from regkit.activity import Segment
from regkit.activity.padding import Validity
from regkit.sites import Columns, OutputSite, Site, WeightSite, oriented

__all__ = [
    "GATE_ALIASES", "OUTPUT_ROLES", "WEIGHT_ROLES", "Adapter", "Columns", "Equations", "Example", "Form", "Output",
    "OutputSite", "Site", "Weight", "WeightSite", "oriented",
]  # fmt: skip

WEIGHT_ROLES = ("kernel", "recurrent", "bias", "projection")
OUTPUT_ROLES = ("output", "state", "cell")

GATE_ALIASES: Mapping[str, str] = {
    "i": "input", "f": "forget", "g": "cell", "c": "cell", "o": "output",
    "r": "reset", "z": "update", "n": "new", "h": "new",
}  # fmt: skip
"""torch's letters (LSTM i, f, g, o; GRU r, z, n) and Keras' (c for g, h for n)."""


@dataclass(frozen=True)
class Weight:
    """A weight of a module, as an adapter describes the weight. Kinds see a row for each unit.

    parameters: the attribute's name, dotted in a submodule; two names mean a pair of biases, of which the sum acts.
    role: kernel, recurrent, bias, projection, or one of the adapter's `roles`.
    layer, direction: the place in a stacked module: from 0, and forward or backward.
    gates: the gates stacked in the rows, in order; empty where there are no gates.
    separate: of a pair, the gates in which each bias acts on its own, so that the sum means nothing there.
    transposed: the attribute is (inputs, units), as in Keras; kinds see the transpose.
    columns: the weight is these columns of the attribute (after the transposition), as where kernel and recurrent lie
    side by side in one matrix; a single number is one column, seen as a vector.
    through: the submodule (dotted, too) that the module applies to the attribute, element by element, such as a
    softplus; the result acts. Constraints need the submodule's `right_inverse`; that of nn.Softplus is known.
    mask: the attribute (dotted, too) of a tensor of 0 and 1 by which the module multiplies the weight at each call, as
    cells with a wiring do. The product acts; numbers under a 0 are never changed.

    >>> weight = regkit.Weight(("weight_hh",), "recurrent", gates=("reset", "update", "new"))
    >>> weight.layer, weight.direction
    (0, 'forward')
    """

    __reduce_ex__ = _pickled.reduce_value

    parameters: tuple[str, ...]
    role: str
    layer: int = 0
    direction: str = "forward"
    gates: tuple[str, ...] = ()
    separate: tuple[str, ...] = ()
    transposed: bool = False
    columns: Columns = None
    through: str | None = None
    mask: str | None = None


@dataclass(frozen=True)
class Output:
    """An output of a module: the role, the layers and directions, and whether the output runs over time.

    role: output, state, cell, or one of the adapter's `roles`.
    layers, directions: those that the output holds: layers from 0; forward, backward.
    sequence: whether the output has neighbours in time; final states have none.

    >>> regkit.Output("output", layers=(1,), directions=("forward", "backward"), sequence=True).role
    'output'
    """

    __reduce_ex__ = _pickled.reduce_value

    role: str
    layers: tuple[int, ...] = (0,)
    directions: tuple[str, ...] = ("forward",)
    sequence: bool = False


class Form(NamedTuple):
    """The form of an output that is a plain tensor in the result of `observe`, as long as there is no padding.
    role: the tensor's key in the result of `observe`.
    before: for a cell, the key of h_{t-1}; left out, the tensor is a padded sequence.
    initial: for a sequence, the key of the state handed in; if a gradient reaches that, `segments` lays the output out.
    batch_first: the layout of a sequence: (time, batch, features), or batch first, as the module's `batch_first` says.
    directions: the directions that lie side by side in the features; a "backward" one runs against time.

    >>> regkit.Form("output", batch_first=True).directions
    ('forward',)
    """

    role: str
    before: str | None = None
    batch_first: bool = False
    directions: tuple[str, ...] = ("forward",)
    initial: str | None = None


Equations = Callable[[nn.Module, Tensor, Any, int, str], tuple[Mapping[str, Tensor], Any]]
"""(module, x, h, layer, direction) -> (gates, new h): one step of one layer in one direction, as in the cell's paper.

x: (batch, features); h: the state, a tensor or a tuple of tensors, of which the first is the output.
gates: each gate by its name, before or after the nonlinearity; one that enters another is the very tensor returned.
"""


@dataclass(frozen=True)
class Example:
    """A module to try an adapter on, with facts about the module that `regkit.testing` cannot find out.

    make: makes the module, as small as may be.
    features: the number of features of the module's input.
    equations: the gates, written down apart from the adapter; needed where weights have gates.
    state: (module, batch) -> the initial state; needed by equations, and by cells that require a state.
    call: (module, x) -> the outputs over x, both (time, batch, features); left out: module(x), or a loop over time
    where each call is a step, in which the result of a call is the state of the next. x may also be unbatched,
    (time, features), or packed: to refuse that is no fault.
    ignored: globs over the names of parameters that no rule is to reach.

    >>> example = regkit.Example(lambda: nn.LSTM(2, 3), features=2)
    >>> type(example.make()).__name__
    'LSTM'
    """

    __reduce_ex__ = _pickled.reduce_value

    make: Callable[[], nn.Module]
    features: int
    equations: Equations | None = None
    state: Callable[[nn.Module, int], Any] | None = None
    call: Callable[[nn.Module, Any], Any] | None = None
    ignored: tuple[str, ...] = ()


class Adapter(ABC):
    """The description of a class of recurrent modules. An adapter holds no state: one serves every model.

    >>> adapter = regkit.Registry(allow=()).adapter(nn.GRU(2, 3))
    >>> [weight.role for weight in adapter.weights(nn.GRU(2, 3))]
    ['kernel', 'recurrent', 'bias', 'bias', 'bias']
    """

    modules: ClassVar[tuple[type[nn.Module] | str, ...]]
    """The classes that the adapter describes, with their subclasses; the adapter of the nearest ancestor serves.

    A class may be given by name, `"package.module:Class"`, after the module that defines the class: then the package
    need not be imported, or even be there.
    """

    gates: ClassVar[tuple[str, ...]] = ()
    """Every gate name that its weights may have, for the vocabulary of targets."""

    roles: ClassVar[tuple[str, ...]] = (*WEIGHT_ROLES, *OUTPUT_ROLES)
    """Every role that its weights and outputs may have."""

    steps: ClassVar[bool] = False
    """Whether one call of the module is one step of time, as of a cell."""

    ignored: ClassVar[tuple[str, ...]] = ()
    """Globs over the names of the module's own parameters that are no weights: no rule is to reach these.

    A parameter of the module itself that is neither ignored nor kept in a weight is told: a rule on every weight would
    leave it out without a word.
    """

    encloses: ClassVar[bool] = False
    """Whether the adapter describes all that is in the module: recurrent submodules then have no sites of their own."""

    @abstractmethod
    def weights(self, module: nn.Module) -> Iterable[Weight]:
        """Every weight of the module; two biases of which the sum acts come once more, as a pair."""

    @abstractmethod
    def outputs(self, module: nn.Module) -> Sequence[Output]:
        """The outputs of the module."""

    @abstractmethod
    def observe(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> Mapping[str, Any]:
        """The tensors to keep of one call, by role. Runs inside the forward pass, and computes nothing."""

    def starts(self, observed: Mapping[str, Any]) -> bool:
        """Whether an observed call begins a new sequence, as far as the call shows."""
        return False

    @abstractmethod
    def segments(
        self,
        module: nn.Module,
        site: OutputSite,
        observed: Mapping[str, Any],
        valid: Validity | None,
        step: int,
    ) -> Sequence[Segment]:
        """The segments of one observed call. step: the number of calls before, under one and the same validity."""

    def form(self, module: nn.Module, site: OutputSite) -> Form | None:
        """The form of an output, if `segments` only lays out a tensor that `observe` keeps; else None.

        Outputs with a form are reduced many at a time, without `segments`.
        """
        return None

    def examples(self) -> Sequence[Example]:
        """The modules on which `regkit conformance` tries the adapter."""
        return ()
