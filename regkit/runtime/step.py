"""One optimizer step, the model's parameters that its optimizer owns, and the count of steps."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from types import CodeType
from typing import Any, Final

from torch import Tensor, nn
from torch.optim import Optimizer

ParametersById = Mapping[int, nn.Parameter]
"""The model's regularized parameters, by their ids: a step of any of these is one of the attachment's."""

Groups = Mapping[int, dict[str, Any]]
"""The parameter group of each parameter, by its id."""


def moves(parameter: Tensor) -> bool:
    """Whether an optimizer may move a parameter: one that is trained, or that is frozen and has a gradient nonetheless.

    torch moves all that have a gradient: one that `zero_grad(set_to_none=False)` leaves goes on by its momentum.
    """
    return parameter.requires_grad or parameter.grad is not None


class OwnedParameters:
    """The parameters of an optimizer that are also regularized parameters of the model.

    current: the model's regularized parameters.
    all_groups: the parameter group of each parameter of the optimizer; groups: of each owned parameter.
    parameters: the owned parameters; ids: their ids.
    """

    def __init__(self, current: ParametersById, groups: Groups) -> None:
        self.current = current
        self.groups: Groups = {key: groups[key] for key in current if key in groups}
        self.all_groups = self.groups if len(self.groups) == len(groups) else groups  # often the optimizer owns no more
        self.parameters = [current[key] for key in self.groups]
        self.ids = frozenset(self.groups)

    def restrict_to_parameters(self, current: ParametersById) -> OwnedParameters:
        """This ownership, restricted to `current`, the regularized parameters that the model has now."""
        return self if current is self.current else OwnedParameters(current, self.all_groups)

    def without(self, ids: Collection[int]) -> OwnedParameters:
        """This ownership, less the parameters of these ids."""
        return OwnedParameters({key: one for key, one in self.current.items() if key not in ids}, self.all_groups)


@dataclass(eq=False)
class Step:
    """One optimizer step that trains regularized parameters of the model.

    scale: the loss scale that is still in the gradients; a fused optimizer divides by the scale itself.
    index: the number of steps before this one.
    trained: the ids of the parameters that have a gradient, once gradients are complete.
    evaluations: how often gradients have been complete in this step.
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
        """The parameter group of each owned parameter, by the parameter's id."""
        return self.owned.groups

    @property
    def by(self) -> str:
        """The name of the step's optimizer, for a sentence."""
        return "attachment.step()" if self.optimizer is None else type(self.optimizer).__name__


_REMEMBERED: Final = 64
"""The number of steps that are remembered where there are several optimizers."""


def joins(trained: AbstractSet[int], stepped: AbstractSet[int]) -> bool:
    """Whether a step of the parameters `trained` joins the step before, of the parameters `stepped`: none in common.

    Both then count as one step, in which several optimizers share the parameters out among them. All are ids.
    """
    return bool(stepped) and stepped.isdisjoint(trained)


class StepCount:
    """A count of optimizer steps in which the steps of optimizers that share out the parameters count as one.

    A step joins the one before if the two train different parameters; else the next count begins.
    stepped: the ids of all parameters that have been stepped in the present count.
    """

    def __init__(self) -> None:
        self.count = 0
        self.stepped: AbstractSet[int] = frozenset()
        self.history: list[frozenset[int]] = []
        """The ids of the parameters of each remembered step, in order; empty while one optimizer makes all steps."""
        self.asked: frozenset[int] | None = None
        """The ids of the parameters that the loss of the step to come is of, once that was asked."""
        self.followed: dict[frozenset[int], set[frozenset[int]]] = {}
        """For the parameters that losses were of, the ids of the parameters of steps that followed."""

    def index(self, parameters: AbstractSet[int]) -> int:
        """The number, from 0, of the step that an optimizer of these parameters is about to take part in."""
        return self.count - 1 if joins(parameters, self.stepped) else self.count

    def upcoming(self, expected: Callable[[], AbstractSet[int]], trained: Callable[[], AbstractSet[int]]) -> int:
        """The number of the step to come, before any optimizer has begun a step: a loss may be computed so early.

        A step of parameters that have all been stepped begins the next count; one of others joins the present count.
        Where a loss is of both, the optimizer that is likely to step next is the one that followed a loss of just these
        before, if that tells one loss from another; else the one that did the last time that optimizers had stepped in
        the same order; where they never had, any that has not stepped yet.

        expected: returns the ids of the parameters that any optimizer owns.
        trained: returns the ids of the parameters that the loss is of.
        """
        if not self.stepped:
            return self.count
        owned = expected()
        ids = trained() & owned
        if ids and ids <= self.stepped:
            return self.count
        after = self.followed.get(frozenset(ids), set())
        likely = next(iter(after)) if len(after) == 1 < len(self.followed) else self._likely()
        if likely is not None and not (joins(ids, self.stepped) and ids.isdisjoint(likely)):
            return self.index(likely)
        return self.count if owned <= self.stepped else self.count - 1

    def _likely(self) -> frozenset[int] | None:
        """The parameters of the step that followed the longest past stretch like the present one; None without any."""
        past, best, length = self.history, None, 0
        for end in range(len(past) - 1, 0, -1):
            same = 0
            while same < end and past[end - 1 - same] == past[-1 - same]:
                same += 1
            if same > length:
                best, length = past[end], same
        return best

    def advance(self, parameters: AbstractSet[int]) -> None:
        """Count a step of an optimizer of these parameters."""
        parameters = frozenset(parameters)  # mostly no copy
        if self.asked is not None and len(self.followed) < _REMEMBERED:
            self.followed.setdefault(self.asked, set()).add(parameters)
        self.asked = None
        if self.stepped and self.stepped != parameters and not self.history:
            self.history.append(frozenset(self.stepped))
        if self.history:
            self.history = [*self.history[-_REMEMBERED:], parameters]
        if joins(parameters, self.stepped):
            if not isinstance(self.stepped, set):
                self.stepped = set(self.stepped)
            self.stepped.update(parameters)
        else:
            self.count += 1
            self.stepped = parameters

    def keep(self, parameters: Mapping[int, object]) -> None:
        """Tell which parameters exist. If all stepped ones were replaced, the next step begins the next count."""
        if self.stepped and self.stepped.isdisjoint(parameters):
            self.forget()

    def restore(self, count: int, stepped: Iterable[int]) -> None:
        """Go on from a saved count, in which these parameters have been stepped."""
        self.forget()
        self.count, self.stepped = count, frozenset(stepped)

    def forget(self) -> None:
        """Forget which optimizers have stepped, and after which losses."""
        self.stepped, self.history, self.asked, self.followed = frozenset(), [], None, {}
