"""The laws of constraints as functions of tensors: dtypes, devices, NaN, zeros, lists, compilation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from regkit import Constraint
from regkit.testing import functions as laws
from regkit.testing.functions import Function, named
from regkit.testing.laws import Laws, hold
from regkit.testing.samples.compiling import can_compile, compiles
from regkit.testing.samples.feasible import starts
from regkit.testing.samples.tensors import DTYPES, HALVES, difference, random, shapes, strided, weights, with_zeros
from regkit.testing.sharding.parts import given_forms

PROJECTION_LAWS: Final[Laws[Constraint]] = Laws()
"""The laws of every constraint as a function of tensors."""


@PROJECTION_LAWS.add(root=1)
def keeps_shape_and_dtype(constraint: Constraint) -> None:
    """A projection is written back into the weight: another shape would be broadcast, another dtype rounded
    again. Return w's shape and dtype; compute in float32 at least, and end with `.to(w.dtype)`."""
    for dtype in DTYPES:
        for w in weights(constraint, 3.0, dtype):
            laws.fits(constraint.project(w), w.shape, w.dtype, f"project() of {named(w)}")


@PROJECTION_LAWS.add()
def weight_is_left_alone(constraint: Constraint) -> None:
    """Projections are tried before anything is written, and violations only looked at. Change nothing in place in
    `project`, `violation` and their like: `clamp`, not `clamp_`; a copy, where you must write."""
    laws.leaves_alone(_pure(constraint), [one for w in weights(constraint, 9.0) for one in (w, strided(w))])


@PROJECTION_LAWS.add()
def strides_do_not_matter(constraint: Constraint) -> None:
    """A gate's block is a view of a larger weight, and may be transposed. Use `reshape` or `flatten` where you use
    `view`, and dimensions rather than strides."""
    laws.strides_do_not_matter(_pure(constraint), weights(constraint, 3.0))


@PROJECTION_LAWS.add()
def finite_at_zero(constraint: Constraint) -> None:
    """Biases begin at zero, and sparse training makes zero rows: 0/0 is a NaN in the model. Divide by a norm only where
    the quotient is finite; a norm may also be so small that 1 over it is infinite."""
    for dtype in DTYPES:
        for shape in shapes(constraint):
            tiny = random(shape, 2, 3.0, dtype)
            tiny.view(-1)[0] = torch.finfo(dtype).smallest_normal / 4
            samples = [*with_zeros(shape, dtype), (f"{named(tiny)} with a tiny entry", tiny)]
            laws.is_finite(_main_functions(constraint), samples)


@PROJECTION_LAWS.add()
def nan_is_never_hidden(constraint: Constraint) -> None:
    """A NaN weight is a run that has failed, and must be seen. Let NaN through: the violation is NaN, and so is the
    projection there. `nan_to_num`, `fmin` and a `where` on a comparison hide it. (A decomposition that raises
    LinAlgError does not.)"""
    error = torch.linalg.LinAlgError  # type: ignore[attr-defined]  # torch has it, its types do not
    laws.shows_nan(_pure(constraint), [(w, w.numel() - 1) for w in weights(constraint)], errors=error)


@PROJECTION_LAWS.add()
def halves_accumulate_in_float32(constraint: Constraint) -> None:
    """Sums of many half-precision squares overflow (65504 in float16) and stall (at 256 in bfloat16). Compute norms in
    float32, e.g. `torch.linalg.vector_norm(w, dtype=torch.float32)`, and round only the result."""
    cell = constraint.layout == "cell"
    long = [(4, 2, 512), (2, 1, 2048), (4, 64)] if cell else [(2, 2048), (2048, 2), (2048,)]
    for shape in (one for one in long if len(one) - cell in constraint.ranks and constraint.fits(one) is None):
        for dtype in HALVES:
            room = 2 * torch.finfo(dtype).eps
            laws.accumulates_wide(_main_functions(constraint), [random(shape, 3, 30.0, dtype)], room)


@PROJECTION_LAWS.add()
def never_waits_for_the_device(constraint: Constraint) -> None:
    """Reading a number of a tensor back stops a GPU at every step of the optimizer. Avoid `float(t)`, `t.item()`,
    `t.numpy()`, `if t > 0` and boolean indexing; write `torch.where`, `clamp` and tensors without dimensions."""
    laws.never_waits(_functions(constraint), shapes(constraint))


@PROJECTION_LAWS.add()
def stays_on_its_device(constraint: Constraint) -> None:
    """A constant that is made on the CPU meets a weight on a GPU there, and not here: a weight on `meta` tells. Give
    `device=w.device` to `torch.eye`, `torch.arange` and the like, and never move w."""
    laws.stays_on_device(_functions(constraint), shapes(constraint))


def _functions(constraint: Constraint) -> Iterator[tuple[str, Function]]:
    """The functions of a constraint, by name; `project_` as a function of one weight."""

    def project_(w: Tensor) -> Tensor:
        with torch.no_grad():
            constraint.project_([w, torch.zeros_like(w)])
        return w

    yield from _pure(constraint)
    yield "project_()", project_


def _pure(constraint: Constraint) -> Iterator[tuple[str, Function]]:
    """The functions of a constraint that write nothing, by name."""
    yield from _main_functions(constraint)
    yield from given_forms(constraint)


def _main_functions(constraint: Constraint) -> list[tuple[str, Function]]:
    return [("project()", constraint.project), ("violation()", constraint.violation)]


@PROJECTION_LAWS.add(can_compile)
def compiles_whole(constraint: Constraint) -> None:
    """A training step that is compiled as one graph may include a projection. Use torch operations, without print,
    numpy, `float(t)` or an `if` on what a tensor holds."""
    w = random(shapes(constraint)[0], scale=3.0)
    compiles(constraint.project, [w], "project()")
    compiles(constraint.violation, [w], "violation()")


@PROJECTION_LAWS.add()
def list_form_agrees(constraint: Constraint) -> None:
    """`project_` is `project` of many weights at once, and writes into the weights: optimizers and cuDNN hold these
    very tensors. Write into each (`copy_`, `torch._foreach_mul_`), replace none, and leave allowed ones as they are to
    the last bit; or leave `project_` out, and a loop is used."""
    for dtype in DTYPES:
        rooms = [random((s[0] + 2, *s[1:]), seed, 3.0, dtype) for seed, s in enumerate(shapes(constraint))]
        inside = [w for shape in shapes(constraint)[:3] for w in starts(constraint, shape, dtype, enough=2)]
        parameters = [torch.nn.Parameter(w) for w in weights(constraint, 4.0, dtype)]
        ours = [*(room[1:-1] for room in rooms), *parameters, *map(strided, inside), *inside]  # rows, as a gate's
        margins, before = [room.clone() for room in rooms], [w.detach().clone() for w in ours]
        given, places = list(ours), [w.data_ptr() for w in ours]
        with torch.no_grad():
            constraint.project_(given)
        for w, kept, was, place in zip(given, ours, before, places, strict=True):
            hold(w is kept and w.data_ptr() == place, f"project_() put another tensor in the place of {named(was)}")
            wanted, ulp = constraint.project(was), torch.finfo(dtype).eps
            moved = torch.equal(wanted, was) and not torch.equal(w, was)
            hold(not moved, f"project_() moves {named(was)} that project() leaves alone, by {difference(w, was):.3g}")
            off = difference(w, wanted)
            hold(off <= 2 * ulp, f"project_() leaves {named(was)} off by {off:.3g} times its size from project()'s")
        for room_, margin in zip(rooms, margins, strict=True):
            around = torch.equal(room_[[0, -1]], margin[[0, -1]])
            hold(around, f"project_() wrote beside {tuple(room_[1:-1].shape)}, into rows that were not given")
