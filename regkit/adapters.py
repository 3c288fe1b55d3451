"""Places on recurrent modules that a rule can bind to, and the adapters that know them.

An adapter says of a module class which weights it has (role, layer, direction, the gates stacked in its rows) and what
it puts out. From that, `regkit.plan` makes sites: a `WeightSite` is a block of rows of one weight, an `OutputSite` one
of the things that a module returns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from regkit import _pickled
from regkit.activity import Segment
from regkit.activity.padding import Validity

WEIGHT_ROLES = ("kernel", "recurrent", "bias", "projection")
OUTPUT_ROLES = ("output", "state", "cell")

GATE_ALIASES: Mapping[str, str] = {
    "i": "input", "f": "forget", "g": "cell", "c": "cell", "o": "output",
    "r": "reset", "z": "update", "n": "new", "h": "new",
}  # fmt: skip
"""torch's letters (LSTM i, f, g, o; GRU r, z, n) and Keras' (c for g, h for n)."""


Columns = tuple[int, int] | int | None
"""Columns of a matrix: from the first up to, not including, the second; one alone, as a vector; or all of them."""


@dataclass(frozen=True)
class Weight:
    """A weight of a module, as its adapter sees it. Kinds see it with a row for each unit, wherever it is kept.

    parameters: the attribute's name, dotted where a submodule has it; two names mean a pair of biases of which the sum
    acts.
    gates: the gates stacked in its rows, in their order; empty where there are none.
    separate: of a pair, the gates in which each bias acts on its own, so that the sum means nothing there.
    transposed: it is kept as (inputs, units), as Keras does; kinds see its transpose.
    columns: it is these columns of that (after the transposition), as where kernel and recurrent lie side by
    side in one matrix; a single number is one column, seen as a vector.
    through: the submodule (dotted, too) whose function, element by element, of what is kept is what acts, as a softplus
    that keeps weights positive. Constraints need its `right_inverse`; that of nn.Softplus is known.
    mask: the attribute (dotted, too) of a tensor of 0 and 1 that the module multiplies the weight by at each call, as
    cells with a wiring do. The product is what acts; what the mask takes out is never changed.
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
    """Something that a module puts out: its role, the layers and directions in it, whether it runs over time."""

    __reduce_ex__ = _pickled.reduce_value

    role: str
    layers: tuple[int, ...] = (0,)
    directions: tuple[str, ...] = ("forward",)
    sequence: bool = False


@dataclass(frozen=True)
class WeightSite:
    """A block of rows of one weight (or of a sum of two biases) in a model.

    path, name: the module's dotted path in the model, and the same without the prefixes of wrappers.
    start, rows: the block; gates: the gates stacked in it; gate: the one gate it is, None where it holds all.
    shape: of the block, as kinds see it; units: the rows of the whole weight.
    transposed, columns, through, mask: as its adapter said (`Weight`).
    """

    __reduce_ex__ = _pickled.reduce_value

    path: str
    name: str
    module_class: str
    parameters: tuple[str, ...]
    role: str
    layer: int
    direction: str
    gate: str | None
    start: int
    rows: int
    gates: int
    shape: tuple[int, ...]
    units: int
    transposed: bool = False
    columns: Columns = None
    through: str | None = None
    mask: str | None = None

    @property
    def part(self) -> tuple[Hashable, ...]:
        """Which part of what is kept it is: equal for the same part, and only for that."""
        return self.start, self.rows, self.transposed, self.columns

    @property
    def parameter(self) -> str:
        """What is read, for a table: `weight_hh_l0`, `bias_ih_l0 + bias_hh_l0`, `w.T[:, 0:3] * mask`."""
        whole = "{}" if self.through is None else f"{self.through}({{}})"
        part = ".T" if self.transposed else ""
        if isinstance(self.columns, int):
            part += f"[:, {self.columns}]"
        elif self.columns is not None:
            part += "[:, {}:{}]".format(*self.columns)
        name = " + ".join(whole.format(one) + part for one in self.parameters)
        return name if self.mask is None else f"{name} * {self.mask}"


def oriented(kept: Tensor, transposed: bool, columns: Columns) -> Tensor:
    """The view of what is kept that a `Weight` tells of.

    Raises IndexError or RuntimeError where a tensor of its shape has none.
    """
    if transposed:
        kept = kept.transpose(0, 1)
    if columns is None:
        return kept
    if isinstance(columns, int):
        return kept.select(1, columns)
    start, stop = columns
    return kept.narrow(1, start, stop - start)


class Form(NamedTuple):
    """Where the tensor of an output is in what is observed of a call, as long as no padding is to be left out.

    before: of a cell, where its h_{t-1} is; left out, the tensor is a padded sequence: (time, batch, features), or
    batch first, as the module's attribute `batch_first` says. directions: those that lie side by side in the features;
    what is "backward" runs against time.
    """

    role: str
    before: str | None = None
    batch_first: bool = False
    directions: tuple[str, ...] = ("forward",)


@dataclass(frozen=True)
class OutputSite:
    """One output of one module, and the layers and directions in it that count."""

    __reduce_ex__ = _pickled.reduce_value

    path: str
    name: str
    module_class: str
    role: str
    layers: tuple[int, ...]
    directions: tuple[str, ...]


Site = WeightSite | OutputSite
"""A place that a rule binds to."""

Equations = Callable[[nn.Module, Tensor, Any, int, str], tuple[Mapping[str, Tensor], Any]]
"""(module, x, h, layer, direction) -> (gates, new h): one step of one layer in one direction, as its paper writes it.

x: (batch, features); h: the state, a tensor or a tuple of them, of which the first is what is put out. gates: each gate
by its name, before or after its nonlinearity. Where one enters another, it is the very tensor that is returned.
"""


@dataclass(frozen=True)
class Example:
    """A module to try an adapter on, and what `regkit.testing` cannot know of it.

    make: makes the module, as small as may be. features: of its input.
    equations: which gate is which, said apart from the adapter; needed where weights have gates.
    state: (module, batch) -> the state to begin with; needed by equations, and by cells that must be given one.
    call: (module, x) -> what the module puts out over x, both (time, batch, features); left out: module(x), or a loop
    over time where each call is a step, in which what a call returns is the state of the next. x may also be unbatched,
    (time, features), or packed: to refuse that is no fault.
    ignored: globs over the names of parameters that no rule is to reach.
    """

    __reduce_ex__ = _pickled.reduce_value

    make: Callable[[], nn.Module]
    features: int
    equations: Equations | None = None
    state: Callable[[nn.Module, int], Any] | None = None
    call: Callable[[nn.Module, Any], Any] | None = None
    ignored: tuple[str, ...] = ()


class Adapter(ABC):
    """What regkit must know of a class of recurrent modules. Holds no state: one adapter serves every model."""

    modules: ClassVar[tuple[type[nn.Module] | str, ...]]
    """The classes it knows, subclasses included; of several adapters the one for the nearest ancestor serves.

    A class may be named, `"package.module:Class"`, where it is defined: then its package need not be imported, or even
    be there.
    """

    gates: ClassVar[tuple[str, ...]] = ()
    """Every gate name it may give a weight, for the vocabulary of targets."""

    roles: ClassVar[tuple[str, ...]] = (*WEIGHT_ROLES, *OUTPUT_ROLES)
    """Every role it may give a weight or an output."""

    steps: ClassVar[bool] = False
    """Whether one call of the module is one step of time, as of a cell."""

    encloses: ClassVar[bool] = False
    """Whether it speaks for all that is in the module: recurrent modules in there are then no places of their own."""

    @abstractmethod
    def weights(self, module: nn.Module) -> Iterable[Weight]:
        """Every weight of the module; a pair of biases of which the sum acts comes once more as a pair."""

    @abstractmethod
    def outputs(self, module: nn.Module) -> Sequence[Output]:
        """What the module puts out."""

    @abstractmethod
    def observe(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> Mapping[str, Any]:
        """What to keep of one call, by role. Runs inside the forward pass: it picks, it computes nothing."""

    def starts(self, observed: Mapping[str, Any]) -> bool:
        """Whether an observed call begins a new sequence, as far as it can be told."""
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
        """The segments of one observed call. step: how many calls came before it under the same validity."""

    def form(self, module: nn.Module, site: OutputSite) -> Form | None:
        """Where the tensor of an output is in what `observe` keeps, if all that `segments` does is to lay that out.

        Outputs of a form are reduced many at a time, without `segments`.
        """
        return None

    def examples(self) -> Sequence[Example]:
        """Modules that `regkit conformance` tries it on."""
        return ()
