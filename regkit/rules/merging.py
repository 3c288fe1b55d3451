"""Penalties that act alike, made one: as many calls of a kind at a step as there are different things to do."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import replace

from regkit.errors import PluginError
from regkit.kinds import Penalty
from regkit.rules.penalty_rule import PenaltyRule
from regkit.weights.block import Block


def merged(rules: Iterable[PenaltyRule]) -> list[PenaltyRule]:
    """Rules that add the same gradients as these.

    Kinds that have a sum (`Penalty.plus`), as l1 and l2 do, act once where they are on the same blocks at the same
    schedule; equal kinds at equal schedules act once on all their blocks, as an l2 of kernels and one of recurrent
    weights.
    """
    return _united(_fused(rules))


def _fused(rules: Iterable[PenaltyRule]) -> list[PenaltyRule]:
    """One rule for those of which the kinds have a sum."""
    found: list[PenaltyRule] = []
    places: dict[Hashable, list[int]] = {}
    for rule in rules:
        here = places.setdefault(rule.binding.weights, [])
        for index in here:
            if (total := _sum(found[index], rule)) is not None:
                found[index] = total
                break
        else:
            here.append(len(found))
            found.append(rule)
    return found


def _sum(one: PenaltyRule, other: PenaltyRule) -> PenaltyRule | None:
    """One rule for two on the same weights, where they have a sum. Raises PluginError where `plus` gives no kind."""
    if one.binding.schedule != other.binding.schedule:
        return None
    try:
        total: object = one.penalty.plus(other.penalty)
    except Exception as error:  # a kind is a stranger's code: anything can come out
        raise _wrong(one, other, f"fails: {error!r}") from error
    if total is None:
        return None
    if not isinstance(total, Penalty):
        raise _wrong(one, other, f"is {total!r}, not a penalty or None")
    if not total.layout == one.penalty.layout == other.penalty.layout:
        return None
    return _as_one([one, other], total, one.blocks, addends=(*(one.addends or (one.penalty,)), other.penalty))


def _wrong(one: PenaltyRule, other: PenaltyRule, how: str) -> PluginError:
    kind = type(one.penalty)
    return PluginError(
        f"rule {one.binding.key!r}: plus of {kind.__module__}.{kind.__qualname__} for {other.penalty.describe()} {how}"
    )


def _united(rules: Iterable[PenaltyRule]) -> list[PenaltyRule]:
    """One rule for those of equal kinds, unless two of them are about the same weight."""
    groups: dict[Hashable, list[_Group]] = {}
    for rule in rules:
        some = groups.setdefault((type(rule.penalty), repr(rule.penalty), repr(rule.binding.schedule)), [])
        if not any(group.takes(rule) for group in some):
            some.append(_Group(rule))
    return [_together(group.rules) for some in groups.values() for group in some]


class _Group:
    """Rules of equal kinds at equal schedules, on different weights."""

    def __init__(self, rule: PenaltyRule) -> None:
        self.rules, self._weights = [rule], _weights(rule)

    def takes(self, rule: PenaltyRule) -> bool:
        """Take a rule in, if it is such a one. Told by `==`: the `repr` of a kind may leave options out."""
        first, weights = self.rules[0], _weights(rule)
        if rule.penalty != first.penalty or rule.binding.schedule != first.binding.schedule or weights & self._weights:
            return False
        self.rules.append(rule)
        self._weights |= weights
        return True


def _weights(rule: PenaltyRule) -> set[Hashable]:
    return {(site.path, site.parameters) for site in rule.binding.weights}


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
    return PenaltyRule(binding, blocks, first.snapshots, whose=whose or {}, addends=addends)
