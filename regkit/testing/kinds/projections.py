"""The laws of constraints as functions of tensors: dtypes, devices, NaN, zeros, lists, and what they leave as it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from regkit import Constraint
from regkit.testing.laws import Laws, hold
from regkit.testing.samples.compiling import compiles
from regkit.testing.samples.feasible import starts
from regkit.testing.samples.tensors import HALVES, difference, random, shapes, strided, weights
from regkit.testing.sharding.parts import Function, given_forms

PROJECTION_LAWS: Final[Laws[Constraint]] = Laws()
"""What every constraint keeps, whatever its set."""

_DTYPES: Final = (torch.float64, torch.float32, *HALVES)


def named(w: Tensor) -> str:
    """A weight, for a sentence."""
    return f"a weight {tuple(w.shape)} of {str(w.dtype).removeprefix('torch.')}"


@PROJECTION_LAWS.add()
def keeps_shape_and_dtype(constraint: Constraint) -> None:
    """What is projected is written back into the weight: another shape would be broadcast, another dtype rounded
    again. Return w's shape and dtype; compute in float32 at least, and end with `.to(w.dtype)`."""
    for dtype in _DTYPES:
        for w in weights(constraint, 3.0, dtype):
            point = constraint.project(w)
            hold(point.shape == w.shape, f"project() of {named(w)} has shape {tuple(point.shape)}")
            hold(point.dtype == w.dtype, f"project() of {named(w)} is {point.dtype}")


@PROJECTION_LAWS.add()
def weight_is_left_alone(constraint: Constraint) -> None:
    """Projections are tried before anything is written, and violations only looked at. Change nothing in place in
    `project`, `violation` and their like: `clamp`, not `clamp_`; a copy, where you must write."""
    for w in weights(constraint, 9.0):
        for form in (w, strided(w)):
            before = form.clone()
            for name, function in _pure(constraint):
                version = form._version
                function(form)
                same = form._version == version and torch.equal(form, before)
                hold(
                    same, f"{name}() wrote into {named(w)}: an entry is off by {difference(form, before):g} of the size"
                )


@PROJECTION_LAWS.add()
def strides_do_not_matter(constraint: Constraint) -> None:
    """A gate's block is a view of a larger weight, and may be transposed. Use `reshape` or `flatten` where you use
    `view`, and dimensions rather than strides."""
    for w in weights(constraint, 3.0):
        for name, function in _pure(constraint):
            off = difference(function(strided(w)), function(w))
            hold(off < 1e-9, f"{name}() of {named(w)} as a view is off by {off:.3g} times its size")


@PROJECTION_LAWS.add()
def finite_at_zero(constraint: Constraint) -> None:
    """Biases begin at zero, and sparse training makes zero rows: 0/0 is a NaN in the model. Divide by a norm only where
    the quotient is finite; a norm may also be so small that 1 over it is infinite."""
    for dtype in _DTYPES:
        for shape in shapes(constraint):
            for what, w in _with_zeros(shape, dtype):
                for name, function in (("project", constraint.project), ("violation", constraint.violation)):
                    result = function(w)
                    strange = result[~result.isfinite()]
                    hold(not strange.numel(), f"{name}() of {named(w)} with {what} has {strange.tolist()[:3]} in it")


def _with_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    zeros, tiny, row, column = (random(shape, seed, 3.0, dtype) for seed in range(4))
    zeros.zero_()
    tiny.view(-1)[0] = torch.finfo(dtype).smallest_normal / 4
    row[0] = 0
    column[..., 0] = 0
    yield from (("nothing but zeros", zeros), ("a tiny entry", tiny), ("a zero row", row), ("a zero column", column))


@PROJECTION_LAWS.add()
def nan_is_never_hidden(constraint: Constraint) -> None:
    """A NaN weight is a run that has failed, and must be seen. Let it through: the violation is NaN, and so is the
    projection there. `nan_to_num`, `fmin` and a `where` on a comparison hide it. (A decomposition that raises
    LinAlgError does not.)"""
    for w in weights(constraint):
        w.view(-1)[-1] = torch.nan
        for name, function in _pure(constraint):
            try:
                last = function(w).reshape(-1)[-1]  # of the sums too it is the one with the NaN in it
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # torch has it, its types do not
                continue
            hold(last.isnan(), f"{name}() of {named(w)} with a NaN in it makes {last.item():g} of it")


@PROJECTION_LAWS.add()
def halves_accumulate_in_float32(constraint: Constraint) -> None:
    """Sums of many half-precision squares overflow (65504 in float16) and stall (at 256 in bfloat16). Compute norms in
    float32, e.g. `torch.linalg.vector_norm(w, dtype=torch.float32)`, and round only the result."""
    cell = constraint.layout == "cell"
    long = [(4, 2, 512), (2, 1, 2048), (4, 64)] if cell else [(2, 2048), (2048, 2), (2048,)]
    for shape in (shape for shape in long if len(shape) - cell in constraint.ranks):
        for dtype in HALVES:
            w, room = random(shape, 3, 30.0, dtype), 2 * torch.finfo(dtype).eps
            for name, function in (("project", constraint.project), ("violation", constraint.violation)):
                ours, exact = function(w), function(w.double())
                off = difference(ours, exact)
                hold(
                    off <= room,
                    f"{name}() of {named(w)} is off by {off:.3g} times its size: {float(ours.abs().max()):.6g}, where "
                    f"float64 has {float(exact.abs().max()):.6g}",
                )


@PROJECTION_LAWS.add()
def never_waits_for_the_device(constraint: Constraint) -> None:
    """Reading a number of a tensor back stops a GPU at every step of the optimizer. Avoid `float(t)`, `t.item()`,
    `t.numpy()`, `if t > 0` and boolean indexing; write `torch.where`, `clamp` and tensors without dimensions."""
    taken = shapes(constraint)
    with FakeTensorMode():
        for name, function in _functions(constraint):
            for shape in taken:
                try:
                    function(torch.empty(shape, dtype=torch.float64, device="cpu"))
                except Exception as error:  # whatever it meets without data: it is said in full
                    hold(False, f"{name}() of a fake weight {shape} raised {type(error).__name__}: {error}")


@PROJECTION_LAWS.add()
def stays_on_its_device(constraint: Constraint) -> None:
    """A constant that is made on the CPU meets a weight on a GPU there, and not here: a weight on `meta` tells. Give
    `device=w.device` to `torch.eye`, `torch.arange` and the like, and never move w."""
    for shape in shapes(constraint):
        for name, function in _functions(constraint):
            try:
                result = function(torch.empty(shape, dtype=torch.float64, device="meta"))
            except Exception as error:  # whatever it meets there: it is said in full
                hold(False, f"{name}() of a weight {shape} on meta raised {type(error).__name__}: {error}")
            hold(result.is_meta, f"{name}() of a weight {shape} on meta is on {result.device}")


def _functions(constraint: Constraint) -> Iterator[tuple[str, Function]]:
    """What it computes of one weight, by name."""

    def project_(w: Tensor) -> Tensor:
        with torch.no_grad():
            constraint.project_([w, torch.zeros_like(w)])
        return w

    yield from _pure(constraint)
    yield "project_", project_


def _pure(constraint: Constraint) -> Iterator[tuple[str, Function]]:
    """Those of its functions that write nothing, by name."""
    yield "project", constraint.project
    yield "violation", constraint.violation
    yield from given_forms(constraint)


@PROJECTION_LAWS.add()
def compiles_whole(constraint: Constraint) -> None:
    """A training step that is compiled as one graph may have a projection in it. Use torch operations, without print,
    numpy, `float(t)` or an `if` on what a tensor holds."""
    w = random(shapes(constraint)[0], scale=3.0)
    compiles(constraint.project, [w], "project()")
    compiles(constraint.violation, [w], "violation()")


@PROJECTION_LAWS.add()
def list_form_agrees(constraint: Constraint) -> None:
    """`project_` is `project` of many weights at once, and writes where they are kept: optimizers and cuDNN hold those
    very tensors. Write into each (`copy_`, `torch._foreach_mul_`), replace none, and leave allowed ones as they are to
    the last bit; or leave `project_` out, and a loop is used."""
    for dtype in _DTYPES:
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
