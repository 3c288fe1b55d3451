"""One optimizer step, and what of the model its optimizer owns."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from types import CodeType
from typing import Any, Final

from torch import Tensor, nn
from torch.optim import Optimizer

ParametersById = Mapping[int, nn.Parameter]
"""The model's parameters that make a step one of the attachment's, by their ids."""

Groups = Mapping[int, dict[str, Any]]
"""The parameter group of each parameter, by its id."""


class OwnedParameters:
    """The parameters of an optimizer that are also the model's.

    groups: of all parameters of the optimizer; ours: of the model's, which `leaves` lists and `ids` holds.
    """

    def __init__(self, here: ParametersById, groups: Groups) -> None:
        self.current = here
        self.groups: Groups = {key: groups[key] for key in here if key in groups}
        self.all_groups = self.groups if len(self.groups) == len(groups) else groups  # often all is the model's
        self.parameters = [here[key] for key in self.groups]
        self.ids = frozenset(self.groups)

    def restrict_to_parameters(self, here: ParametersById) -> OwnedParameters:
        """This ownership, restricted to the parameters that the model has now."""
        return self if here is self.current else OwnedParameters(here, self.all_groups)

    def without(self, taken: Collection[int]) -> OwnedParameters:
        """This ownership, less the parameters of these ids."""
        return OwnedParameters({key: leaf for key, leaf in self.current.items() if key not in taken}, self.all_groups)


@dataclass(eq=False)
class Step:
    """One optimizer step that owns parameters of the model.

    scale: the loss scale still in the gradients; a fused optimizer divides by it itself.
    index: how many steps came before it.
    trained: the ids of the parameters that have a gradient, once gradients are complete.
    evaluations: how often gradients have been complete in it.
    """

    optimizer: Optimizer | None
    owned: OwnedParameters
    scale: Tensor | None
    skipped: bool
    index: int
    frame: tuple[int, CodeType] | None
    trained: frozenset[int] = frozenset()
    evaluations: int = 0

    @property
    def groups(self) -> Groups:
        """The parameter group of each of its parameters."""
        return self.owned.groups

    @property
    def by(self) -> str:
        """Who makes the step, for a sentence."""
        return "attachment.step()" if self.optimizer is None else type(self.optimizer).__name__


_REMEMBERED: Final = 64
"""How many steps are remembered, where there are several optimizers."""


class StepCount:
    """Optimizer steps, where several optimizers that share the parameters out among them count once.

    A step joins the one before if it trains none of the same parameters; one that does begins the next.
    """

    def __init__(self) -> None:
        self.count = 0
        self.stepped: AbstractSet[int] = frozenset()
        self.history: list[frozenset[int]] = []
        """Who stepped, the last one last; empty while that is one alone."""

    def index(self, parameters: AbstractSet[int]) -> int:
        """The number, from 0, of the step that an optimizer of these parameters is about to take part in."""
        joins = self.stepped and self.stepped is not parameters and self.stepped.isdisjoint(parameters)
        return self.count - 1 if joins else self.count

    def upcoming(self, expected: Callable[[], AbstractSet[int]]) -> int:
        """The number of the step to come, whoever makes it: a loss is computed before that is known.

        Who steps next is who did the last time that those before had stepped in this order; where they never had,
        whoever has not stepped yet. expected: the parameters that any optimizer owns.
        """
        if not self.stepped:
            return self.count
        likely = self._likely()
        if likely is None:
            return self.count if expected() <= self.stepped else self.count - 1
        return self.index(likely)

    def _likely(self) -> frozenset[int] | None:
        """Who followed on the longest stretch of steps that was there before."""
        past, best, length = self.history, None, 0
        for end in range(len(past) - 1, 0, -1):
            same = 0
            while same < end and past[end - 1 - same] == past[-1 - same]:
                same += 1
            if same > length:
                best, length = past[end], same
        return best

    def advance(self, parameters: AbstractSet[int]) -> None:
        """An optimizer of these parameters has stepped."""
        parameters = frozenset(parameters)  # which it mostly is itself
        if self.stepped and self.stepped != parameters and not self.history:
            self.history.append(frozenset(self.stepped))
        if self.history:
            self.history = [*self.history[-_REMEMBERED:], parameters]
        if self.stepped and self.stepped is not parameters and self.stepped.isdisjoint(parameters):
            if not isinstance(self.stepped, set):
                self.stepped = set(self.stepped)
            self.stepped.update(parameters)
        else:
            self.count += 1
            self.stepped = parameters

    def keep(self, parameters: Mapping[int, object]) -> None:
        """These are there now. Where none of those that were stepped is, all were replaced: no step can join theirs."""
        if self.stepped.isdisjoint(parameters):
            self.stepped, self.history = frozenset(), []

    def restore(self, count: int, stepped: Iterable[int]) -> None:
        """Go on from a saved count, of which these parameters have been stepped."""
        self.count = count
        self.stepped, self.history = frozenset(stepped), []
