"""The kinds of penalties, constraints and schedules that the README defines, as formulas of a few lines."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def coefficients(penalty: dict[str, Any]) -> tuple[float, float]:
    """What Σ|w| and Σw² are multiplied by."""
    if penalty["kind"] == "l1_l2":
        return penalty["l1"], penalty["l2"]
    return (penalty["strength"], 0.0) if penalty["kind"] == "l1" else (0.0, penalty["strength"])


def penalty_of(penalty: dict[str, Any], w: Tensor) -> Tensor:
    l1, l2 = coefficients(penalty)
    return l1 * w.abs().sum() + l2 * (w * w).sum()


def shrunk(penalty: dict[str, Any], w: Tensor, size: float) -> Tensor:
    """The point that makes size · penalty + ½‖point − w‖² least."""
    l1, l2 = coefficients(penalty)
    return w.sign() * torch.relu(w.abs() - size * l1) / (1 + 2 * size * l2)


def factor(rule: dict[str, Any], index: int) -> float:
    """What a rule's schedule multiplies by at a step."""
    schedule = rule.get("schedule")
    if schedule is None:
        return 1.0
    if schedule["kind"] == "piecewise":
        return schedule["values"][sum(index >= boundary for boundary in schedule["boundaries"])]
    passed = min(index / schedule["steps"], 1.0)
    return schedule["start"] + passed * (schedule["end"] - schedule["start"])


def _norms(constraint: dict[str, Any], w: Tensor, gates: int) -> Tensor:
    """The norm of the group that each number is in. A bias is a column."""
    per = constraint.get("per", "unit")
    rows = w.reshape(len(w), -1)
    if per == "matrix":
        norms = rows.norm()
    elif per == "input":
        norms = rows.norm(dim=0, keepdim=True)
    elif per == "cell":  # the rows of its gates
        cells = rows.reshape(gates, -1, rows.shape[1])
        norms = cells.square().sum((0, 2)).sqrt().repeat(gates).unsqueeze(1)
    else:
        norms = rows.norm(dim=1, keepdim=True)
    return norms.expand_as(rows).reshape(w.shape)


def _wanted(rule: dict[str, Any], norms: Tensor, index: int) -> Tensor:
    """The norms that groups of these are to have."""
    constraint = rule["constraint"]
    if constraint["kind"] == "unit_norm":
        return torch.ones_like(norms)
    return norms.clamp(max=constraint["max_value"] * factor(rule, index))


def projected(rule: dict[str, Any], w: Tensor, index: int, gates: int) -> Tensor:
    """The nearest weight in a constraint's set at a step; a group of zeros has no direction to grow in, and stays."""
    constraint = rule["constraint"]
    if constraint["kind"] == "non_negative":
        return torch.relu(w)
    norms = _norms(constraint, w, gates)
    return torch.where(norms > 0, w * (_wanted(rule, norms, index) / norms), w)


def violation_of(rule: dict[str, Any], w: Tensor, index: int, gates: int) -> float:
    """How far outside the worst group is, or the worst number."""
    constraint = rule["constraint"]
    if constraint["kind"] == "non_negative":
        return float(torch.relu(-w).max())
    norms = _norms(constraint, w, gates)
    return float((norms - _wanted(rule, norms, index)).abs().max())
