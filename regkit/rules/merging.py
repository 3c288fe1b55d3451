"""Penalties that act alike, made one: a step calls kinds as often as there are different things to do."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import replace

from regkit.errors import PluginError
from regkit.kinds import Penalty
from regkit.rules.penalty_rule import PenaltyRule
from regkit.weights.block import Block


def merged(rules: Iterable[PenaltyRule]) -> list[PenaltyRule]:
    """As few rules as may be, which add the same gradients as `rules`.

    Kinds that have a sum (`Penalty.plus`), as l1 and l2 do, act once where they are on the same blocks at the same
    schedule; equal kinds at equal schedules act once on all their blocks, as an l2 of kernels and one of recurrent
    weights.
    """
    return _united(_summed(rules))


def _summed(rules: Iterable[PenaltyRule]) -> list[PenaltyRule]:
    """The rules, with one in the place of several on the same weights that have a sum."""
    found: list[PenaltyRule] = []
    places: dict[Hashable, list[int]] = {}
    for rule in rules:
        on_the_same = places.setdefault(rule.binding.weights, [])
        for index in on_the_same:
            if (total := _sum(found[index], rule)) is not None:
                found[index] = total
                break
        else:
            on_the_same.append(len(found))
            found.append(rule)
    return found


def _sum(one: PenaltyRule, other: PenaltyRule) -> PenaltyRule | None:
    """One rule for two on the same weights; None without a sum. Raises PluginError where `plus` gives no kind."""
    if one.binding.schedule != other.binding.schedule:
        return None
    try:
        total: object = one.kind.plus(other.kind)
    except Exception as error:  # a kind is a stranger's code: anything can come out
        raise _wrong(one, other, f"fails: {error!r}") from error
    if total is None:
        return None
    if not isinstance(total, Penalty):
        raise _wrong(one, other, f"is {total!r}, not a penalty or None")
    if not total.layout == one.kind.layout == other.kind.layout:
        return None
    return _as_one([one, other], total, one.blocks, (*(one.addends or (one.kind,)), other.kind))


def _wrong(one: PenaltyRule, other: PenaltyRule, how: str) -> PluginError:
    kind = type(one.kind)
    return PluginError(
        f"rule {one.binding.key!r}: plus of {kind.__module__}.{kind.__qualname__} for {other.kind.describe()} {how}"
    )


def _united(rules: Iterable[PenaltyRule]) -> list[PenaltyRule]:
    """The rules, with one in the place of several of equal kinds, unless two of these are about the same weight."""
    groups: dict[Hashable, list[tuple[list[PenaltyRule], set[Hashable]]]] = {}
    for rule in rules:
        weights: set[Hashable] = {(site.path, site.parameters) for site in rule.binding.weights}
        alike = groups.setdefault((type(rule.kind), repr(rule.kind), repr(rule.binding.schedule)), [])
        for group, of_group in alike:
            # Compared by `==`, too: the `repr` of a kind may leave options out.
            equal = rule.kind == group[0].kind and rule.binding.schedule == group[0].binding.schedule
            if equal and of_group.isdisjoint(weights):
                group.append(rule)
                of_group |= weights
                break
        else:
            alike.append(([rule], weights))
    return [_together(group) for alike in groups.values() for group, _ in alike]


def _together(rules: list[PenaltyRule]) -> PenaltyRule:
    """One rule in the place of several of equal kinds."""
    first, *others = rules
    if not others:
        return first
    rule_keys = {block: rule.binding.key for rule in rules for block in rule.blocks}
    return _as_one(rules, first.kind, list(rule_keys), first.addends, rule_keys)


def _as_one(
    rules: list[PenaltyRule],
    kind: Penalty,
    blocks: list[Block],
    addends: tuple[Penalty, ...],
    rule_keys: Mapping[Block, str] | None = None,
) -> PenaltyRule:
    first = rules[0]
    binding = replace(first.binding, key=", ".join(rule.binding.key for rule in rules), kind=kind)
    return PenaltyRule(binding, kind, blocks, first.snapshots, rule_keys or {}, addends=addends)
