"""Values of penalties and violations of constraints, on the model as of now."""

from __future__ import annotations

import torch
from torch import Tensor

from regkit.engine.tracker import StepTracker
from regkit.rules.activity_rule import ActivityRule
from regkit.rules.rule_set import RuleSet, named
from regkit.rules.weight_rule import WeightRule


def values(rules: RuleSet, tracker: StepTracker, device: torch.device) -> dict[str, Tensor]:
    """The value of each penalty rule at its next step, detached, by the rule's key.  -> () each.

    device: of the value of a rule that acts on nothing.
    """
    indices = [_index(rule, tracker) for rule in rules.penalties]
    snapshot = rules.snapshots.fresh()
    pairs = zip(rules.penalties, indices, strict=True)
    found: dict[str, Tensor | None] = {rule.binding.key: named(rule, rule.value, index) for rule, index in pairs}
    snapshot.forget()
    for activity in rules.activities:
        value = named(activity, activity.value, _index(activity, tracker))
        last = torch.full((), torch.nan, device=device) if activity.last is None else activity.last
        found[activity.binding.key] = last if value is None else value
    zero = torch.zeros((), device=device)
    return {key: zero if value is None else value.detach() for key, value in found.items()}


def violations(rules: RuleSet, tracker: StepTracker, device: torch.device) -> dict[str, Tensor]:
    """The largest violation of each constraint rule at its next step, by the rule's key.  -> () each.

    device: as of `values`.
    """
    indices = [_index(rule, tracker) for rule in rules.constraints]
    snapshot = rules.snapshots.fresh()
    zero = torch.zeros((), device=device)
    pairs = zip(rules.constraints, indices, strict=True)
    found = {rule.binding.key: named(rule, rule.violation, index) for rule, index in pairs}
    snapshot.forget()
    return {key: zero if worst is None else worst for key, worst in found.items()}


def _index(rule: WeightRule | ActivityRule, tracker: StepTracker) -> int:
    """The number of the next step that acts for a rule, whichever optimizer takes the next step of all."""
    if rule.binding.schedule is None:
        return tracker.count.count
    if isinstance(rule, WeightRule):
        return tracker.count.upcoming(tracker.engine.expected, rule.moving)
    recorded = [p for _, recorder in rule.places for p in recorder.parameters]
    trained = frozenset(id(p) for p in recorded if p.requires_grad)
    return tracker.count.upcoming(tracker.engine.expected, lambda: trained)
