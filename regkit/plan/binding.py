"""A rule bound to a model: its kind, its sites, and how the kind acts on the sites."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from regkit.adapters import OutputSite, Site, WeightSite
from regkit.errors import StepError
from regkit.kinds import ActivityPenalty, Constraint, Penalty, Schedule, Via
from regkit.runtime.modes import is_capturing


@dataclass(frozen=True)
class Binding:
    """One rule, bound to the sites of a model.

    key: the rule's name in reports. kind, schedule, via, every, optional: as in the rule, its defaults filled in.
    weights, outputs: the sites on which the kind acts. origin: the plugin that offers the kind.
    frozen: the sites that nothing moved when the rule was bound.
    absent: each thing that an optional rule asks for and the model lacks.
    uncovered: the parameters that no adapter describes, and no rule can reach: the names of module and parameter.
    """

    key: str
    kind: Penalty | ActivityPenalty | Constraint
    schedule: Schedule | None
    via: Via
    every: int
    optional: bool
    weights: tuple[WeightSite, ...] = ()
    outputs: tuple[OutputSite, ...] = ()
    origin: str = ""
    frozen: tuple[WeightSite, ...] = ()
    absent: tuple[str, ...] = ()
    uncovered: tuple[tuple[str, str], ...] = ()

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every site that the rule is bound to."""
        return (*self.weights, *self.outputs)

    def factor(self, index: int) -> float:
        """The schedule's factor at a step, 1 without a schedule.

        Raises StepError where a schedule gives no finite number ≥ 0, or where a CUDA graph would keep the factor.
        """
        if self.schedule is None:
            return 1.0
        self.refuse_capture(index)
        try:
            factor = self.schedule.factor(index)
        except Exception as error:  # the schedule's author may raise anything
            raise StepError(
                f"rule {self.key!r}: {self.schedule.describe()}, of plugin {type(self.schedule).__module__}, failed at "
                f"step {index}: {error!r}"
            ) from error
        if not isinstance(factor, (int, float)) or not 0 <= factor < math.inf:
            raise StepError(f"rule {self.key!r}: {self.schedule.describe()} gives {factor!r} at step {index}")
        return factor

    def amount(self, index: int) -> float:
        """strength · factor of a penalty at a step."""
        assert not isinstance(self.kind, Constraint)
        return self.kind.strength if self.schedule is None else self.kind.strength * self.factor(index)

    @property
    def counts(self) -> bool:
        """Whether the rule acts differently at different steps."""
        return self.schedule is not None or self.every > 1

    def refuse_capture(self, index: int) -> None:
        """Raise StepError where the rule counts steps and a CUDA graph is captured, which would repeat one step."""
        if self.counts and is_capturing():
            counts = f"every {self.every} steps" if self.schedule is None else self.schedule.describe()
            raise StepError(
                f"rule {self.key!r} counts steps ({counts}), and a CUDA graph is being captured: each replay would do "
                f"what is done at step {index}, for no Python runs in it. Keep what the rule acts in out of the graph "
                "(for a rule on weights optimizer.step(), else the loss), or the count out of the rule"
            )

    @property
    def how_it_acts(self) -> str:
        """How and when the rule acts, for the plan's table."""
        if isinstance(self.kind, Constraint):
            return "projected after each step" if self.every == 1 else f"projected after every {self.every} steps"
        return _HOW_PENALTIES_ACT[self.via]

    @property
    def label(self) -> str:
        """The rule's key and kind, for the sentence of an error."""
        return f"rule {self.key!r} ({self.kind.describe()})"

    @property
    def title(self) -> str:
        """The kind, its options and its schedule."""
        return self.kind.describe() + (f" × {self.schedule.describe()}" if self.schedule else "")


_HOW_PENALTIES_ACT: Final[dict[str, str]] = {
    "gradient": "added to the gradient at each step",
    "loss": "in penalty(), which the loop adds to the loss",
    "proximal": "proximal operator after each step",
    "decoupled": "decoupled decay at each step",
    "inject": "joins the gradient of the outputs",
}
