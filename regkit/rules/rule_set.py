"""A plan's rules on the live model, by the channel through which each acts."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NoReturn, ParamSpec, TypeVar

from torch import Tensor, nn

from regkit.adapters import WeightSite
from regkit.errors import AttachError, PluginError, RegkitError, StepError
from regkit.kinds import ActivityPenalty, Layout, Penalty, Via
from regkit.plan.plan import Plan
from regkit.recording.injector import Injector, Scale
from regkit.recording.recorder import Recorder
from regkit.rules.activity_rule import ActivityRule, At, Intake
from regkit.rules.constraint_rule import ConstraintRule
from regkit.rules.merging import merged
from regkit.rules.penalty_rule import PenaltyRule
from regkit.rules.weight_rule import WeightRule
from regkit.weights.block import Block
from regkit.weights.links import Parameters, links
from regkit.weights.snapshot import Snapshots

P = ParamSpec("P")
T = TypeVar("T")


def named(rule: WeightRule | ActivityRule, run: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The result of `run`. Raises StepError, with the rule and the place named, where a plugin's mathematics fails."""
    try:
        return run(*args, **kwargs)
    except Exception as error:  # a kind is a stranger's code: anything can come out
        raise_named(rule, error)


def raise_named(rule: WeightRule | ActivityRule | At, error: Exception) -> NoReturn:
    """Raise an error of the rule's mathematics as one that names the rule and the place."""
    binding = rule.binding
    if isinstance(error, AttachError):
        raise AttachError(f"{binding.label}: {error}") from error
    told = str(error).startswith(f"rule {binding.key!r}")  # as a trial of the kind does
    if isinstance(error, RegkitError) and (told or not isinstance(error, PluginError)):
        raise error
    where = "" if rule.at is None else f" on {rule.at.name or 'the model'}"
    failed = f"rule {binding.key!r}: {binding.title}, of plugin {binding.origin}, failed{where}: "
    if isinstance(error, PluginError):
        raise PluginError(f"{failed}{error}") from error
    raise StepError(f"{failed}{error!r}") from error


@dataclass(eq=False)
class RuleSet:
    """Every rule of a plan, in the document's order.

    recorders: of the activity rules.
    snapshots: of the modules whose parameters make a step one of the attachment's.
    by_gradient, by_loss, by_prox, by_decay: the penalties on weights, by the way in which each acts.
    scheduled: whether a rule that goes through the loss has a schedule.
    loss_recorders: the recorders of rules via loss.
    injectors: the recorders of rules via inject.
    """

    penalties: list[PenaltyRule]
    constraints: list[ConstraintRule]
    activities: list[ActivityRule]
    recorders: list[Recorder]
    snapshots: Snapshots

    def __post_init__(self) -> None:
        self.by_gradient, self.by_loss, self.by_prox, self.by_decay = (
            [rule for rule in self.penalties if rule.binding.via == via]
            for via in ("gradient", "loss", "proximal", "decoupled")
        )
        self.by_gradient = merged(self.by_gradient)
        through = [*(rule.binding for rule in self.activities), *(rule.binding for rule in self.by_loss)]
        self.scheduled = any(binding.schedule is not None for binding in through)
        self.injectors = [one for one in self.recorders if isinstance(one, Injector)]
        self.loss_recorders = [one for one in self.recorders if not isinstance(one, Injector)]

    @cached_property
    def intake(self) -> Intake:
        """The intake of the activity that goes through the loss."""
        return Intake(self.activities, self.loss_recorders, raise_named)

    @property
    def on_weights(self) -> list[PenaltyRule | ConstraintRule]:
        """The rules on weights."""
        return [*self.penalties, *self.constraints]

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """The living modules that rules are bound to, by name."""
        found = {block.site.name: block.alive() for rule in self.on_weights for block in rule.blocks}
        found |= {recorder.name: recorder.alive() for recorder in self.recorders}
        return ((name, module) for name, module in found.items() if module is not None)

    def acts(self) -> Iterator[tuple[Hashable, str, str]]:
        """Every place that a kind acts on: a key that is equal for the same place, the place's name, the rule's key."""
        for rule in self.on_weights:
            for block in rule.blocks:
                site, ids = block.site, tuple(map(id, block.parameters()))
                yield (rule.binding.kind.kind, ids, site.part), block.name, rule.binding.key
        for activity in self.activities:
            for output, recorder in activity.places:
                place = (activity.binding.kind.kind, id(recorder.module), output.role, output.layers, output.directions)
                yield place, f"the {output.role} of {output.name or 'the model'}", activity.binding.key

    def inject(self, scale: Scale | None, index: Callable[[], int]) -> None:
        """Configure the injectors. Raises AttachError where there are injectors and no scale, or a scale for no rule.

        scale: the loss scale.
        index: gives the number of the step to come.
        """
        if self.injectors if scale is None else all(rule.binding.via != "inject" for rule in self.activities):
            raise AttachError(
                'loss_scale= goes with rules via "inject", and they with it: what the loop multiplies its loss by, 1.0 '
                "for nothing, a function such as scaler.get_scale for what changes"
            )
        for injector in self.injectors:
            rules = [rule for rule in self.activities if any(one is injector for _, one in rule.places)]
            consume = Intake(rules, [injector], raise_named).consume
            injector.configure(consume, index, 1.0 if scale is None else scale)

    def in_the_loss(self) -> frozenset[int]:
        """The ids of the trainable parameters that the next penalty is of: of modules with recorded outputs, if any."""
        recorded = (one for one in self.recorders if one.calls.last is not None or one.calls.records)
        found = [p for recorder in recorded for p in recorder.parameters]
        found = found or [p for rule in self.by_loss for p in rule.parameters()]
        return frozenset(id(p) for p in found if p.requires_grad)

    def project_all(self, index: int) -> None:
        """Project every constrained weight that is not frozen, as at the step of a number."""
        snapshot = self.snapshots.fresh()
        for rule in self.constraints:
            named(rule, rule.project_all, index)
            snapshot.forget()

    def discard(self) -> None:
        """Drop recorded outputs, and the tickets of penalties that were not backpropagated."""
        for recorder in self.recorders:
            recorder.clear()
            recorder.ledger.discard()
        for rule in self.by_loss:
            rule.ledger.discard()

    def loss_terms(self, index: int) -> list[Tensor]:
        """The penalties of weights that go through the loss at a step."""
        snapshot = self.snapshots.fresh()
        values = [named(rule, rule.value, index) for rule in self.by_loss]
        snapshot.forget()
        return [value for value in values if value is not None]


def rules_of(plan: Plan, model: nn.Module) -> RuleSet:
    """The plan's rules on a model. Nothing is hooked yet."""
    modules = dict(model.named_modules(remove_duplicate=False))
    recorders = _recorders(plan, modules)
    paths = dict.fromkeys(site.path for binding in plan.bindings for site in binding.sites)
    bound: list[tuple[str, list[Block]]] = []
    watched = _trained(plan, model, modules)
    everything = Parameters(model) if recorders else ()
    snapshots = Snapshots(bound, watched, links(model, paths), everything)
    penalties: list[PenaltyRule] = []
    constraints: list[ConstraintRule] = []
    activities: list[ActivityRule] = []
    for binding in plan.bindings:
        kind = binding.kind
        if isinstance(kind, ActivityPenalty):
            places = [(site, recorders[id(modules[site.path]), binding.via]) for site in binding.outputs]
            activities.append(ActivityRule(binding, kind, places))
            continue
        own = [_block(site, modules, kind.layout) for site in binding.weights]
        bound.append((binding.label, own))
        if isinstance(kind, Penalty):
            penalties.append(PenaltyRule(binding, kind, own, snapshots))
        else:
            constraints.append(ConstraintRule(binding, kind, own, snapshots))
    return RuleSet(penalties, constraints, activities, list(recorders.values()), snapshots)


def _trained(plan: Plan, model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterable[nn.Module]:
    """The modules of which a trained parameter makes a step one of the attachment's.

    With an activity rule: all, for the gradient of the rule may flow anywhere.
    """
    bound = [modules[site.path] for binding in plan.bindings for site in binding.weights]
    if any(binding.outputs for binding in plan.bindings):
        bound += [module for module in model.modules() if module._parameters]
    return bound


def _block(site: WeightSite, modules: Mapping[str, nn.Module], layout: Layout) -> Block:
    parent = modules[site.path.rpartition(".")[0]] if site.path else None
    return Block(site, modules[site.path], parent, layout)


def _recorders(plan: Plan, modules: Mapping[str, nn.Module]) -> dict[tuple[int, Via], Recorder]:
    """One recorder for each module under activity rules and each way that these act, by the module's id and the way.

    Injectors come first: other recorders record the outputs that an injector has put in place of the module's.
    """
    found: dict[tuple[int, Via], Recorder] = {}
    for binding in sorted(plan.bindings, key=lambda one: one.via != "inject"):
        for site in binding.outputs:
            module = modules[site.path]
            if (id(module), binding.via) not in found:
                make = Injector if binding.via == "inject" else Recorder
                found[id(module), binding.via] = make(module, plan.registry.adapter(module), site.name)
    return found
