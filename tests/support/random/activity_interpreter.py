"""Activity penalties written out from their papers in plain torch, without anything of regkit, to compare it with.

A `Sight` is a piece of activity of one direction of one layer, as a sum runs over it: rows that hold data, and pairs of
a row with the one computed before it. `penalties` reads a document and says what each rule comes to over many sights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

Pairs = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Sight:
    """What one call of a module put out in one role.

    rows: (rows, features), without padding; pairs: h_t and h_{t-1}, (pairs, features) each; batch: how many sequences.
    """

    module: str
    role: str
    rows: Tensor
    batch: int
    pairs: Pairs | None = None
    layer: int = 0
    direction: str = "forward"


def sequence(h: Tensor, valid: Tensor, backward: bool = False) -> tuple[Tensor, Pairs]:
    """The rows and the pairs of a padded sequence.  h: (time, batch, features); valid: (time, batch)."""
    both = valid[1:] & valid[:-1]
    later, earlier = h[1:][both], h[:-1][both]
    return h[valid], (earlier, later) if backward else (later, earlier)


def penalties(document: Mapping[str, Any], sights: Sequence[Sight], step: int) -> dict[str, Tensor]:
    """strength · factor · penalty of every rule, by its name.  -> () each."""
    return {rule["name"]: _rule(rule, sights, step) for rule in document["rules"]}


def _rule(rule: Mapping[str, Any], sights: Sequence[Sight], step: int) -> Tensor:
    """A rule on several modules and roles is the sum over them."""
    penalty = rule["penalty"]
    seen: dict[tuple[str, str], list[Sight]] = {}
    for sight in sights:
        if _aimed_at(rule.get("target", {}), sight):
            seen.setdefault((sight.module, sight.role), []).append(sight)
    amount = penalty.get("strength", 1.0) * _factor(rule.get("schedule"), step)
    return amount * torch.stack([_reduced(penalty, some) for some in seen.values()]).sum()


def _aimed_at(target: Mapping[str, Any], sight: Sight) -> bool:
    def among(field: str, value: Any, otherwise: Any) -> bool:
        wanted = target.get(field, otherwise)
        return any(fnmatchcase(str(value), str(one)) for one in (wanted if isinstance(wanted, list) else [wanted]))

    return (
        among("module", sight.module, "*")
        and among("role", sight.role, "output")
        and among("layer", sight.layer, "*")
        and among("direction", sight.direction, "*")
    )


def _reduced(penalty: Mapping[str, Any], sights: Sequence[Sight]) -> Tensor:
    """The numbers of all sights of one place, summed or averaged."""
    numbers = [_numbers(penalty, sight) for sight in sights]
    reduction = penalty.get("reduction", "mean")
    if reduction == "batch":
        return torch.stack([one.sum() / sight.batch for one, sight in zip(numbers, sights, strict=True)]).sum()
    total = torch.stack([one.sum() for one in numbers]).sum()
    return total / max(sum(one.numel() for one in numbers), 1) if reduction == "mean" else total


def _numbers(penalty: Mapping[str, Any], sight: Sight) -> Tensor:
    """What is summed up: a number for each element, or, of the norm stabilizer, for each row."""
    h, kind = _wide(sight.rows), penalty["kind"]
    if kind == "activity_l1":
        return h.abs()
    if kind == "activity_l2":
        return h**2
    if kind == "activity_l1_l2":
        return penalty["l1"] * h.abs() + penalty["l2"] * h**2
    if sight.pairs is None:
        return h[:0]
    later, earlier = map(_wide, sight.pairs)
    if kind == "temporal":
        return (later - earlier) ** 2
    assert kind == "norm_stabilizer"
    return (later.norm(dim=-1) - earlier.norm(dim=-1)) ** 2


def _wide(h: Tensor) -> Tensor:
    return h if h.dtype is torch.float64 else h.float()


def _factor(schedule: Mapping[str, Any] | None, step: int) -> float:
    """A schedule at optimizer step t, from 0."""
    if schedule is None:
        return 1.0
    kind = schedule["kind"]
    if kind == "constant":
        return schedule["value"]
    if kind == "piecewise":
        return schedule["values"][sum(step >= boundary for boundary in schedule["boundaries"])]
    share = step / schedule["steps"]
    if kind == "exponential":
        return schedule.get("start", 1.0) * schedule["decay"] ** share
    start, end, share = schedule["start"], schedule["end"], min(share, 1.0)
    if kind == "cosine":
        return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
    assert kind == "linear"
    return start + (end - start) * share
