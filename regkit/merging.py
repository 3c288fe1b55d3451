"""Penalties that act alike, made one: as many calls of a kind at a step as there are different things to do."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import replace

from regkit.blocks import Block
from regkit.kinds import Penalty
from regkit.weights import PenaltyRule


def merged(rules: Iterable[PenaltyRule]) -> list[PenaltyRule]:
    """Rules that add the same gradients as these.

    Kinds that have a sum (`Penalty.plus`), as l1 and l2 do, act once where they are on the same blocks at the same
    schedule; equal kinds at equal schedules act once on all their blocks, as an l2 of kernels and one of recurrent
    weights.
    """
    return _united(_fused(rules))


def _fused(rules: Iterable[PenaltyRule]) -> list[PenaltyRule]:
    """One rule for those of which the kinds have a sum."""
    found: dict[Hashable, PenaltyRule] = {}
    for rule in rules:
        place: Hashable = (rule.binding.weights, repr(rule.binding.schedule))
        other = found.get(place)
        total = None if other is None else other.penalty.plus(rule.penalty)
        if other is None or total is None or total.layout != rule.penalty.layout:
            found[place if other is None else (place, rule.binding.key)] = rule
        else:
            addends = (*(other.addends or (other.penalty,)), rule.penalty)
            found[place] = _as_one([other, rule], total, other.blocks, addends=addends)
    return list(found.values())


def _united(rules: Iterable[PenaltyRule]) -> list[PenaltyRule]:
    """One rule for those of equal kinds, unless two of them are about the same weight."""
    alike: dict[Hashable, list[PenaltyRule]] = {}
    taken: dict[Hashable, set[Hashable]] = {}
    for rule in rules:
        kind = rule.penalty
        same: Hashable = (type(kind), repr(kind), repr(rule.binding.schedule))
        weights = {(site.path, site.parameters) for site in rule.binding.weights}
        if weights & taken.setdefault(same, set()):
            same = (same, rule.binding.key)
        taken.setdefault(same, set()).update(weights)
        alike.setdefault(same, []).append(rule)
    return [_together(group) for group in alike.values()]


def _together(rules: list[PenaltyRule]) -> PenaltyRule:
    first, *others = rules
    if not others:
        return first
    whose = {block: rule.binding.key for rule in rules for block in rule.blocks}
    return _as_one(rules, first.penalty, list(whose), first.addends, whose)


def _as_one(
    rules: list[PenaltyRule],
    kind: Penalty,
    blocks: list[Block],
    addends: tuple[Penalty, ...] = (),
    whose: Mapping[Block, str] | None = None,
) -> PenaltyRule:
    first = rules[0]
    binding = replace(first.binding, key=", ".join(rule.binding.key for rule in rules), kind=kind)
    return PenaltyRule(binding, blocks, first.census, whose=whose or {}, addends=addends)
