"""The base of kinds that act on weights: the forms and parts of a weight that such a kind is for."""

from __future__ import annotations

from typing import ClassVar, Literal

from regkit.kinds.kind import Kind

Layout = Literal["matrix", "gate", "cell"]
"""The form in which a kind sees a stacked weight: (rows, columns), each gate's (hidden, columns), or (gates, hidden,
columns). A bias comes without the columns.
"""

Separable = Literal["elements", "rows"] | None
"""The parts of a weight on which a kind can act one by one, in any order and in several processes."""


class _OnWeights(Kind):
    """A kind that acts on weights."""

    @property
    def separable(self) -> Separable:
        """The parts of a weight that can be treated one by one: `elements`, `rows`, or None (Parikh & Boyd 2014, §2.1).

        A penalty is then the sum of the parts' values, with the parts' gradients and proximal points side by side; a
        constraint projects each part, and the worst part is its violation. Where several processes hold a weight in
        shards, no process needs the shards of another. No kind of `layout` "cell" has "rows".
        """
        return None

    ranks: ClassVar[tuple[int, ...]] = (1, 2)
    """The numbers of dimensions that a weight may have: 1 for biases, 2 for matrices."""

    @property
    def layout(self) -> Layout:
        """The layout in which the kind sees a stacked weight."""
        return "matrix"

    def fits(self, shape: tuple[int, ...]) -> str | None:
        """The reason why the kind is not for weights of a shape, in one line, or None where the kind is.

        shape: in the kind's layout, of one of its `ranks`. Asked once for each weight as a plan is made: a weight that
        does not fit is an error there, and left out of an optional rule.
        """
        return None
