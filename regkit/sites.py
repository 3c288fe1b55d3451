"""Places on recurrent modules that a rule can bind to, and the adapters that know them.

An adapter says of a module class which weights it has (role, layer, direction, the gates stacked in its rows) and what
it puts out. From that, `regkit.plan` makes sites: a `WeightSite` is a block of rows of one weight, an `OutputSite` one
of the things that a module returns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from regkit.activity import Segment
from regkit.validity import Validity

WEIGHT_ROLES = ("kernel", "recurrent", "bias", "projection")
OUTPUT_ROLES = ("output", "state", "cell")

GATE_ALIASES: Mapping[str, str] = {
    "i": "input", "f": "forget", "g": "cell", "c": "cell", "o": "output",
    "r": "reset", "z": "update", "n": "new", "h": "new",
}  # fmt: skip
"""torch's letters (LSTM i, f, g, o; GRU r, z, n) and Keras' (c for g, h for n)."""


@dataclass(frozen=True)
class Weight:
    """A weight of a module, as its adapter sees it.

    parameters: the attribute's name; two names mean a pair of biases of which the sum acts.
    gates: the gates stacked in its rows, in their order; empty where there are none.
    separate: of a pair, the gates in which each bias acts on its own, so that the sum means nothing there.
    """

    parameters: tuple[str, ...]
    role: str
    layer: int = 0
    direction: str = "forward"
    gates: tuple[str, ...] = ()
    separate: tuple[str, ...] = ()


@dataclass(frozen=True)
class Output:
    """Something that a module puts out: its role, the layers and directions in it, whether it runs over time."""

    role: str
    layers: tuple[int, ...] = (0,)
    directions: tuple[str, ...] = ("forward",)
    sequence: bool = False


@dataclass(frozen=True)
class WeightSite:
    """A block of rows of one weight (or of a sum of two biases) in a model.

    path, name: the module's dotted path in the model, and the same without the prefixes of wrappers.
    start, rows: the block; gates: the gates stacked in it; gate: the one gate it is, None where it holds all.
    shape: of the block.
    """

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


@dataclass(frozen=True)
class OutputSite:
    """One output of one module, and the layers and directions in it that count."""

    path: str
    name: str
    module_class: str
    role: str
    layers: tuple[int, ...]
    directions: tuple[str, ...]


Site = WeightSite | OutputSite
"""A place that a rule binds to."""


class Adapter(ABC):
    """What regkit must know of a class of recurrent modules. Holds no state: one adapter serves every model."""

    modules: ClassVar[tuple[type[nn.Module], ...]]
    """The classes it knows, subclasses included; of several adapters the one for the nearest ancestor serves."""

    gates: ClassVar[tuple[str, ...]] = ()
    """Every gate name it may give a weight, for the vocabulary of targets."""

    roles: ClassVar[tuple[str, ...]] = (*WEIGHT_ROLES, *OUTPUT_ROLES)
    """Every role it may give a weight or an output."""

    steps: ClassVar[bool] = False
    """Whether one call of the module is one step of time, as of a cell."""

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
