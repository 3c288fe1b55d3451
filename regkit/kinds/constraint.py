"""Constraints on weights."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor

from regkit.errors import PluginError, StepError
from regkit.kinds.on_weights import _OnWeights


class Constraint(_OnWeights):
    """A set of allowed weights, given by the projection onto the set.

    >>> ball = regkit.load({"rules": [{"constraint": "max_norm(1)"}]}).rules[0].constraint
    >>> ball.project(torch.tensor([[3.0, 4.0]]))
    tensor([[0.6000, 0.8000]])
    """

    bounds: ClassVar[tuple[str, ...]] = ()
    """The options that a schedule multiplies; none: the constraint takes no schedule."""

    @property
    def convex(self) -> bool:
        """Whether the set is convex, as a ball is and a sphere is not: the laws of `regkit.testing` then ask more."""
        return True

    @abstractmethod
    def project(self, w: Tensor) -> Tensor:
        """The nearest allowed point, in w's shape and dtype; w itself is unchanged."""

    @abstractmethod
    def violation(self, w: Tensor) -> Tensor:
        """The distance of w from the set, in the unit of the bound: 0 exactly where w is allowed.  -> ()."""

    @property
    def pooled(self) -> tuple[int, ...] | None:
        """The axes of `sums`: (1,) for norms of rows, (0,) for norms of columns, (0, 1) for the norm of a matrix.

        None where a part of a weight cannot be projected from such sums. Where several processes hold a weight in
        shards, they add up their sums, and no process needs the shards of another. A vector is a matrix of one column.
        """
        return None

    def sums(self, w: Tensor) -> Tensor:
        """The sums of w, (rows, columns), over the `pooled` axes, which stay, in float32 or better; w may be empty."""
        raise PluginError(f"{self.kind} offers no sums")

    def project_given(self, w: Tensor, sums: Tensor) -> Tensor:
        """`project` for a part w of a weight.  sums: of the whole weight along the pooled axes, of w along others."""
        raise PluginError(f"{self.kind} offers no sums")

    def violation_given(self, w: Tensor, sums: Tensor) -> Tensor:
        """`violation` for a part w of at least a row and a column.  sums: as in `project_given`.  -> ()."""
        raise PluginError(f"{self.kind} offers no sums")

    def project_(self, weights: list[Tensor]) -> None:
        """List form of `project`, in place: weights become their nearest allowed points. No two weights overlap."""
        for w in weights:
            w.copy_(self.project(w))

    def at(self, factor: float) -> Constraint:
        """This constraint with its bounds multiplied by a schedule's factor, which must be > 0."""
        if factor <= 0:
            raise StepError(f"{self.kind}: a schedule took the bound to 0, which would make every weight 0")
        return self.model_copy(update={bound: getattr(self, bound) * factor for bound in self.bounds})
