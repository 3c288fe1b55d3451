"""One optimizer step, and what of the model its optimizer owns."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import CodeType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

ParametersById = Mapping[int, nn.Parameter]
"""The model's parameters that make a step one of the attachment's, by their ids."""

Groups = Mapping[int, dict[str, Any]]
"""The parameter group of each parameter, by its id."""


class Owned:
    """The parameters of an optimizer that are also the model's.

    groups: of all parameters of the optimizer; ours: of the model's, which `leaves` lists and `ids` holds.
    """

    def __init__(self, here: ParametersById, groups: Groups) -> None:
        self.here = here
        self.ours: Groups = {key: groups[key] for key in here if key in groups}
        self.groups = self.ours if len(self.ours) == len(groups) else groups  # often all is the model's
        self.leaves = [here[key] for key in self.ours]
        self.ids = frozenset(self.ours)

    def among(self, here: ParametersById) -> Owned:
        """This ownership, restricted to the parameters that the model has now."""
        return self if here is self.here else Owned(here, self.groups)

    def without(self, taken: Collection[int]) -> Owned:
        """This ownership, less the parameters of these ids."""
        return Owned({key: leaf for key, leaf in self.here.items() if key not in taken}, self.groups)


@dataclass(eq=False)
class Step:
    """One optimizer step that owns parameters of the model.

    scale: the loss scale still in the gradients; a fused optimizer divides by it itself.
    index: how many steps came before it.
    trained: the ids of the parameters that have a gradient, once gradients are complete.
    evaluations: how often gradients have been complete in it.
    """

    optimizer: Optimizer | None
    owned: Owned
    scale: Tensor | None
    skipped: bool
    index: int
    frame: tuple[int, CodeType] | None
    trained: frozenset[int] = frozenset()
    evaluations: int = 0

    @property
    def groups(self) -> Groups:
        """The parameter group of each of its parameters."""
        return self.owned.ours

    @property
    def by(self) -> str:
        """Who makes the step, for a sentence."""
        return "attachment.step()" if self.optimizer is None else type(self.optimizer).__name__
