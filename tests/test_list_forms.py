"""List forms do what the loops do, in as many operations for many weights as for few, and hold little meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from laws import CONS, PENS, Case, each
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import regkit
from regkit import Penalty
from regkit.batches import own_forms

ADDING = [case for case in PENS if "add_gradients" in own_forms(case.kind)]
SUMMING = [case for case in PENS if "values" in own_forms(case.kind)]
PROJECTING = [case for case in CONS if "project_" in own_forms(case.kind)]
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
SHAPES = [(5, 3), (1, 4), (4, 1), (7,), (3, 2, 4), (3, 5)]


def weights_of(kind: Any, dtype: torch.dtype) -> list[Tensor]:
    """Weights of every shape that the kind takes, some of them views that are not contiguous, with zeros in them."""
    wanted = (2, 3) if kind.layout == "cell" else (1, 2)
    found = [torch.randn(shape) for shape in SHAPES if len(shape) in wanted]
    found += [torch.randn(8, 6)[2:5], torch.randn(6, 8).t(), torch.randn(6, 9)[:, 2:5], torch.zeros(3, 3)]
    found[0][0] = 0
    return [one.to(dtype) for one in found]


def test_the_kinds_that_are_arithmetic_on_each_number_or_row_have_list_forms_of_their_own():
    assert {case.kind.kind for case in ADDING} == {"l1", "l2", "l1_l2"}
    assert {case.kind.kind for case in SUMMING} == {"l2"}
    assert {case.kind.kind for case in PROJECTING} == {"max_norm", "unit_norm", "min_max_norm", "non_negative"}


@DTYPES
@each(ADDING)
def test_add_gradients_adds_what_the_loop_adds(case: Case, dtype: torch.dtype):
    """To the last bit, but for elastic net, where a sum of two products may be rounded once less."""
    ws = weights_of(case.kind, dtype)
    ours, wanted = ([torch.ones_like(w) for w in ws] for _ in range(2))
    kept = [w.clone() for w in ws]
    case.kind.add_gradients(ws, ours, 0.3)
    for w, gradient in zip(ws, wanted, strict=True):
        gradient.add_(case.kind.gradient(w), alpha=0.3)
    last_bit = 4 * torch.finfo(dtype).eps if case.kind.kind == "l1_l2" else 0
    torch.testing.assert_close(ours, wanted, rtol=last_bit, atol=last_bit)
    torch.testing.assert_close(ws, kept, rtol=0, atol=0)


@DTYPES
@each(PROJECTING)
def test_project_leaves_each_weight_the_tensor_it_is_at_the_point_of_the_loop(case: Case, dtype: torch.dtype):
    ws = weights_of(case.kind, dtype)
    wanted = [case.kind.project(w) for w in ws]
    places = [(w.data_ptr(), w.stride()) for w in ws]
    case.kind.project_(ws)
    torch.testing.assert_close(ws, wanted, rtol=0, atol=0)
    assert [(w.data_ptr(), w.stride()) for w in ws] == places


@DTYPES
@each(SUMMING)
def test_values_is_the_sum_of_the_loop_and_so_is_its_gradient(case: Case, dtype: torch.dtype):
    ws = [w.requires_grad_() for w in weights_of(case.kind, dtype)]
    wanted = torch.stack([case.kind.value(w) for w in ws]).sum()
    with torch.no_grad():
        near = 16 * torch.finfo(wanted.dtype).eps
        torch.testing.assert_close(case.kind.values(ws), wanted.detach(), rtol=near, atol=0)
    ours = torch.autograd.grad(case.kind.values(ws), ws)
    torch.testing.assert_close(ours, torch.autograd.grad(wanted, ws), rtol=0, atol=0)


class Seen(TorchDispatchMode):
    """The operations that run, and the bytes of the largest tensor that one of them makes anew."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        known = {one.untyped_storage()._cdata for one in tensors(args)}
        new = [one.nbytes for one in tensors(result) if one.untyped_storage()._cdata not in known]
        self.largest = max([self.largest, *new])
        return result


def tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for one in tree:
            yield from tensors(one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each([*ADDING, *(case for case in PROJECTING if case.kind.layout != "cell")])
def test_no_temporary_is_as_large_as_the_weights(case: Case, dtype: torch.dtype):
    """Weights of 16 MB in float32, in one piece and in many: what is made at a time comes from 4 MB of weights."""
    ws = [torch.randn(shape).to(dtype) for shape in [(2048, 1024), *[(512, 512)] * 8]]
    gs = [torch.ones_like(w) for w in ws]
    wanted = [g + 0.3 * case.kind.gradient(w) for w, g in zip(ws, gs, strict=True)] if case in ADDING else gs
    with Seen() as seen:
        if case in ADDING:
            case.kind.add_gradients(ws, gs, 0.3)
        else:
            case.kind.project_(ws)
    assert seen.largest <= (4 if dtype is torch.float32 else 8) * 2**20
    near = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(gs, [one.to(dtype) for one in wanted], rtol=near, atol=near)


@each([*ADDING, *SUMMING, *PROJECTING])
def test_list_forms_read_nothing_back(case: Case):
    """On tensors that hold no numbers: whatever asked for one, and so would wait for a GPU, would fail."""
    with FakeTensorMode() as mode, torch.no_grad():
        ws = [mode.from_tensor(w) for w in weights_of(case.kind, torch.float32)]
        if isinstance(case.kind, Penalty):
            case.kind.add_gradients(ws, [torch.zeros_like(w) for w in ws], 0.3)
            assert case.kind.values(ws).shape == ()
        else:
            case.kind.project_(ws)


@pytest.mark.parametrize(
    ("rule", "operations"),
    [
        ({"penalty": "l2(0.1)"}, 1),
        ({"penalty": "l1(0.1)"}, 2),
        ({"penalty": "l1_l2(0.1, 0.1)"}, 4),
        ({"constraint": "non_negative"}, 1),
    ],
)
@pytest.mark.parametrize("cells", [1, 100])
def test_a_step_has_as_many_operations_more_for_400_weights_as_for_4(rule: Any, operations: int, cells: int):
    def in_a_step(model: nn.Module) -> int:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()  # which looks whether the weights are finite
        with Seen() as seen:
            optimizer.step()
        return seen.operations

    model = nn.ModuleList([nn.GRUCell(3, 4) for _ in range(cells)])
    bare = in_a_step(model)
    regkit.attach(model, {"rules": [rule]})
    assert in_a_step(model) == bare + operations
