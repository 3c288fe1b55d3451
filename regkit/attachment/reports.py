"""Values of penalties and violations of constraints, on the model as of now."""

from __future__ import annotations

import torch
from torch import Tensor

from regkit.rules.rule_set import RuleSet, named


def values(rules: RuleSet, index: int, device: torch.device) -> dict[str, Tensor]:
    """The value of each penalty rule at a step, detached, by the rule's key.  -> () each.

    index: the number of the step.
    device: of the value of a rule that acts on nothing.
    """
    snapshot = rules.snapshots.fresh()
    found: dict[str, Tensor | None] = {rule.binding.key: named(rule, rule.value, index) for rule in rules.penalties}
    snapshot.forget()
    for activity in rules.activities:
        value = named(activity, activity.value, index)
        last = torch.full((), torch.nan, device=device) if activity.last is None else activity.last
        found[activity.binding.key] = last if value is None else value
    zero = torch.zeros((), device=device)
    return {key: zero if value is None else value.detach() for key, value in found.items()}


def violations(rules: RuleSet, index: int, device: torch.device) -> dict[str, Tensor]:
    """The largest violation of each constraint rule at a step, by the rule's key.  -> () each.

    index, device: as of `values`.
    """
    snapshot = rules.snapshots.fresh()
    zero = torch.zeros((), device=device)
    found = {rule.binding.key: named(rule, rule.violation, index) for rule in rules.constraints}
    snapshot.forget()
    return {key: zero if worst is None else worst for key, worst in found.items()}
