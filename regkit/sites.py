"""Sites, the places in one model that a rule can bind to: blocks of weights, and outputs of modules."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor

from regkit import _pickled

Columns = tuple[int, int] | int | None
"""Columns of a matrix: from the first up to, not including, the second; a single column, as a vector; or all (None)."""


@dataclass(frozen=True)
class WeightSite:
    """A block of rows of one weight (or of a sum of two biases) in a model.

    path, name: the module's dotted path in the model, and this path without the prefixes of wrappers.
    gate: the gate of a block that is one gate's rows; None for a block of all rows.
    start, rows: the first row and the number of rows; gates: the number of gates stacked in the block.
    shape: the block's shape, as kinds see the block; units: the rows of the whole weight.
    transposed, columns, through, mask: as in `Weight`.

    >>> plan = regkit.resolve(nn.LSTM(2, 3), {"rules": [{"penalty": "l2(1)", "target": {"gate": "forget"}}]})
    >>> site = plan.bindings[0].weights[0]
    >>> site.parameter, site.gate, site.start, site.shape
    ('weight_ih_l0', 'forget', 3, (3, 2))
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
        """The part of the attribute that the block is: equal for equal parts, and only for equal parts."""
        return self.start, self.rows, self.transposed, self.columns

    @property
    def parameter(self) -> str:
        """The weight in words, for a table: `weight_hh_l0`, `bias_ih_l0 + bias_hh_l0`, `w.T[:, 0:3] * mask`."""
        whole = "{}" if self.through is None else f"{self.through}({{}})"
        part = ".T" if self.transposed else ""
        if isinstance(self.columns, int):
            part += f"[:, {self.columns}]"
        elif self.columns is not None:
            part += "[:, {}:{}]".format(*self.columns)
        name = " + ".join(whole.format(one) + part for one in self.parameters)
        return name if self.mask is None else f"{name} * {self.mask}"


def oriented(kept: Tensor, transposed: bool, columns: Columns) -> Tensor:
    """The view of an attribute that is the weight, with units in rows: as `transposed` and `columns` in `Weight`.

    Raises IndexError or RuntimeError where a tensor of such a shape has no such view.
    """
    if transposed:
        kept = kept.transpose(0, 1)
    if columns is None:
        return kept
    if isinstance(columns, int):
        return kept.select(1, columns)
    start, stop = columns
    return kept.narrow(1, start, stop - start)


@dataclass(frozen=True)
class OutputSite:
    """One output of one module in a model, with the layers and directions to which a rule applies.

    >>> plan = regkit.resolve(nn.GRU(2, 3), {"rules": [{"penalty": "temporal(1)"}]})
    >>> plan.bindings[0].outputs[0].role
    'output'
    """

    __reduce_ex__ = _pickled.reduce_value

    path: str
    name: str
    module_class: str
    role: str
    layers: tuple[int, ...]
    directions: tuple[str, ...]


Site = WeightSite | OutputSite
"""A place that a rule binds to."""
