"""The trial of a kind's list forms, on small weights of each shape of a rule's, against the loops they stand for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from regkit.kinds import Constraint, Penalty
from regkit.weights.batch import Batch

LOOPS = {"values": "value", "add_gradients": "gradient", "project_": "project"}
"""What each list form is a list form of."""


def own_forms(kind: Penalty | Constraint) -> set[str]:
    """The list forms that the kind's class has of its own."""
    base = Penalty if isinstance(kind, Penalty) else Constraint
    return {form for form in LOOPS if hasattr(base, form) and getattr(type(kind), form) is not getattr(base, form)}


def samples(batch: Batch) -> list[Tensor]:
    """Ones, zeros and ramps up to 1 and 100, of each shape among its weights but for sizes above 8, which are cut."""
    found: list[Tensor] = []
    small = (w[(slice(8),) * w.dim()] for w in batch.outlines())
    for w in {w.shape: w for w in small}.values():
        like = torch.ones_like(w, device="cpu" if w.is_meta else None)
        ramp = torch.linspace(-1, 1, like.numel(), dtype=like.dtype, device=like.device).view(like.shape)
        found += [like, torch.zeros_like(like), ramp, 100 * ramp]
    return found


Compared = Iterator[tuple[str, Sequence[Tensor], Sequence[Tensor]]]
"""Each list form that a kind has of its own, what comes of it, and what comes of the loop."""


def compare_penalty(penalty: Penalty, weights: list[Tensor], by_loss: bool) -> Compared:
    """The list forms of a penalty at these weights; by_loss: with the gradient that autograd makes of `values`."""
    own, kept = own_forms(penalty), [w.clone() for w in weights]
    if "values" in own:
        yield "values", [penalty.values(list(weights))], [Penalty.values(penalty, kept)]
        if by_loss:
            with torch.enable_grad():
                leaves = [w.clone().requires_grad_() for w in weights]
                slopes = torch.autograd.grad(penalty.values(leaves), leaves)
                yield "values", slopes, torch.autograd.grad(Penalty.values(penalty, leaves), leaves)
        yield "values", weights, kept
    if "add_gradients" in own:
        ours, wanted = ([torch.ones_like(w) for w in weights] for _ in range(2))
        penalty.add_gradients(list(weights), list(ours), 0.3)
        Penalty.add_gradients(penalty, kept, wanted, 0.3)
        yield "add_gradients", ours, wanted
        yield "add_gradients", weights, kept


def compare_constraint(constraint: Constraint, weights: list[Tensor]) -> Compared:
    """The list form of a constraint at these weights."""
    if "project_" in own_forms(constraint):
        ours = [w.clone() for w in weights]
        constraint.project_(list(ours))
        yield "project_", ours, [constraint.project(w) for w in weights]


def close(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal up to rounding. Most are just equal, which is told in a tenth of the time."""
    near = max(torch.finfo(of.dtype).eps for of in (one, other)) ** 0.5
    now = one.to(other)
    return torch.equal(now, other) or torch.allclose(now, other, near, near, equal_nan=True)
