"""Penalties on the outputs of modules."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor

from regkit.activity import Activity, Reduction
from regkit.errors import PluginError
from regkit.kinds.kind import _Strong


class ActivityPenalty(_Strong):
    """A scalar function of a module's outputs; strength × factor × value is added to the loss.

    >>> penalty = regkit.load({"rules": [{"penalty": "activity_l2(0.1)"}]}).rules[0].penalty
    >>> penalty.value(regkit.Activity([regkit.activity.Sequenced(torch.full((4, 1, 2), 3.0))]))
    tensor(9.)
    """

    sequence: ClassVar[bool] = False
    """Whether the kind compares neighbours in time, and so needs a role with neighbours."""

    separable: ClassVar[bool] = False
    """Whether the kind is a sum, or mean, over single outputs or pairs of neighbours.

    The value of n outputs of one shape, side by side in the batch, is then the sum of the n values, divided by n unless
    `reduction` is `sum`; and the steps of a loop may come as one sequence.
    """

    reduction: Reduction = "mean"
    """`mean` over valid elements; `batch`: the sum divided by the batch size, as Keras ≥ 3.14; `sum`."""

    @abstractmethod
    def value(self, activity: Activity) -> Tensor:
        """The penalty at unit strength, in float32 or better.  -> ()."""

    def add_gradients(self, activity: Activity, gradients: Activity, amount: Tensor) -> None:
        """gradients += amount · d value / d activity, in place, in closed form; without one, autograd follows `value`.

        gradients: the segments of the activity, with live gradients in the place of the outputs; a view of one is a
        live view of the other. amount: () on their device. Called without autograd, and never waits for a GPU.
        `activity.add_slopes` and `activity.add_pair_slopes` write most such methods.
        """
        raise PluginError(f"{self.kind} offers no add_gradients")

    @property
    def offers_gradients(self) -> bool:
        """Whether the kind knows its gradient in closed form."""
        return type(self).add_gradients is not ActivityPenalty.add_gradients
