"""A plan's rules on the live model, by the channel through which each acts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

from torch import Tensor, nn

from regkit.kinds import ActivityPenalty, Penalty
from regkit.modules import Place
from regkit.plan import Plan
from regkit.records import ActivityRule, Recorder
from regkit.weights import Block, ConstraintRule, PenaltyRule


@dataclass(eq=False)
class Rules:
    """Every rule of a plan, in the document's order.

    recorders: what the activity rules need; places: of all modules that rules are bound to.
    """

    penalties: list[PenaltyRule]
    constraints: list[ConstraintRule]
    activities: list[ActivityRule]
    recorders: list[Recorder]
    places: list[Place]

    def __post_init__(self) -> None:
        self.by_gradient, self.by_loss, self.by_prox, self.by_decay = (
            [rule for rule in self.penalties if rule.binding.via == via]
            for via in ("gradient", "loss", "proximal", "decoupled")
        )

    def loss_terms(self, index: int) -> list[Tensor]:
        """What goes through the loss at a step: activity penalties of what is recorded, weight penalties via loss."""
        terms = [rule.take(index) for rule in self.activities]
        terms += [rule.value(index) for rule in self.by_loss]
        return [term for term in terms if term is not None]


def rules_of(plan: Plan, model: nn.Module) -> Rules:
    """The plan's rules on this model. Nothing is hooked yet."""
    modules = dict(model.named_modules(remove_duplicate=False))
    recorders = _recorders(plan, modules)
    penalties: list[PenaltyRule] = []
    constraints: list[ConstraintRule] = []
    activities: list[ActivityRule] = []
    for binding in plan.bindings:
        kind = binding.kind
        if isinstance(kind, ActivityPenalty):
            places = [(site, recorders[id(modules[site.path])]) for site in binding.outputs]
            activities.append(ActivityRule(binding, places))
            continue
        blocks = [Block(site, modules[site.path], kind.layout) for site in binding.weights]
        if isinstance(kind, Penalty):
            penalties.append(PenaltyRule(binding, blocks))
        else:
            constraints.append(ConstraintRule(binding, blocks))
    paths = dict.fromkeys(site.path for binding in plan.bindings for site in binding.sites)
    return Rules(penalties, constraints, activities, list(recorders.values()), [Place(model, path) for path in paths])


def _recorders(plan: Plan, modules: Mapping[str, nn.Module]) -> dict[int, Recorder]:
    """One recorder for each module that an activity rule binds, by the module's id."""
    found: dict[int, Recorder] = {}
    for site in chain.from_iterable(binding.outputs for binding in plan.bindings):
        module = modules[site.path]
        if id(module) not in found:
            found[id(module)] = Recorder(module, plan.registry.adapter(module), site.name)
    return found
