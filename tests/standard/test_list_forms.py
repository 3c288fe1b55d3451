"""List forms do what the loops do, in as many operations for many weights as for few, and hold little meanwhile."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import regkit
from regkit import Penalty, buckets
from regkit.testing.samples.compiling import compiles
from regkit.weights.batch import own_forms
from tests.support.counting import Counted, operations_of_a_step
from tests.support.laws import CONS, PENS, Case, each, make

ADDING = [case for case in PENS if "add_gradients" in own_forms(case.kind)]
SUMMING = [case for case in PENS if "values" in own_forms(case.kind)]
PROJECTING = [case for case in CONS if "project_" in own_forms(case.kind)]
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
SHAPES = [(5, 3), (1, 4), (4, 1), (7,), (3, 2, 4), (3, 5)]


BOUNDS = pytest.mark.parametrize("bound", [buckets._CPU, 64], ids=["of 4 MB", "of 16 numbers"])
"""As it is; and so small that most weights come in pieces, and few of the others fit together."""
ORTHOGONAL = [case for case in PENS if case.kind.kind == "orthogonal"]


def weights_of(kind: Any, dtype: torch.dtype) -> list[Tensor]:
    """Weights of every shape that the kind takes, some of them views that are not contiguous, with zeros in them."""
    wanted = [rank + (kind.layout == "cell") for rank in kind.ranks]
    found = [torch.randn(shape) for shape in SHAPES if len(shape) in wanted]
    found += [torch.randn(8, 6)[2:5], torch.randn(6, 8).t(), torch.randn(6, 9)[:, 2:5], torch.zeros(3, 3)]
    found[0][0] = 0
    return [one.to(dtype) for one in found]


def test_the_kinds_that_are_arithmetic_on_each_number_row_or_matrix_have_list_forms_of_their_own():
    assert {case.kind.kind for case in ADDING} == {"l1", "l2", "l1_l2", "orthogonal"}
    assert {case.kind.kind for case in SUMMING} == {"l1", "l2", "l1_l2", "orthogonal"}
    assert {case.kind.kind for case in PROJECTING} == {"max_norm", "unit_norm", "min_max_norm", "non_negative"}


def assert_added(kind: Penalty, ours: list[Tensor], wanted: list[Tensor]) -> None:
    """To the last bit, but for sums of products, which may be rounded otherwise: to the last bits of the largest."""
    last_bits = 4 * torch.finfo(ours[0].dtype).eps if kind.kind in ("l1_l2", "orthogonal") else 0
    largest = float(torch.stack([one.abs().max() for one in wanted]).max())
    torch.testing.assert_close(ours, wanted, rtol=last_bits, atol=last_bits * largest)


@DTYPES
@BOUNDS
@each(ADDING)
def test_add_gradients_adds_what_the_loop_adds(case: Case, bound: int, dtype: torch.dtype, monkeypatch: Any):
    monkeypatch.setattr(buckets, "_CPU", bound)
    ws = weights_of(case.kind, dtype)
    ours, wanted = ([torch.ones_like(w) for w in ws] for _ in range(2))
    kept = [w.clone() for w in ws]
    case.kind.add_gradients(ws, ours, 0.3)
    for w, gradient in zip(ws, wanted, strict=True):
        gradient.add_(case.kind.gradient(w), alpha=0.3)
    assert_added(case.kind, ours, wanted)
    torch.testing.assert_close(ws, kept, rtol=0, atol=0)


@pytest.mark.parametrize("l1", [0.0, 1e-38, 1e-9, 1e-6, 1.0, 1e9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_elastic_net_adds_both_parts_however_much_larger_one_is(l1: float, dtype: torch.dtype):
    w = torch.tensor([0.0, 1e-30, -1e-7, 0.5, -3.0, 1e4]).to(dtype)
    gradient, kind = torch.zeros_like(w), make("l1_l2", l1=l1, l2=0.25)
    kind.add_gradients([w], [gradient], 1e-3)
    wanted = 1e-3 * (l1 * w.double().sign() + 0.5 * w.double())
    torch.testing.assert_close(gradient, wanted.to(dtype), rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_of_equal_weights_only_the_one_with_nan_or_infinity_gets_no_orthogonal_gradient(bad: float):
    kind = make("orthogonal", strength=1.0)
    ws = [torch.randn(4, 3) for _ in range(3)]
    ws[1][2, 0] = bad
    gradients = [torch.ones_like(w) for w in ws]
    kind.add_gradients(ws, gradients, 0.3)
    assert torch.equal(gradients[1], torch.ones(4, 3))
    for index in (0, 2):
        torch.testing.assert_close(gradients[index], 1 + 0.3 * kind.gradient(ws[index]))


@DTYPES
@BOUNDS
@each(PROJECTING)
def test_project_leaves_each_weight_the_tensor_it_is_at_the_point_of_the_loop(
    case: Case, bound: int, dtype: torch.dtype, monkeypatch: Any
):
    monkeypatch.setattr(buckets, "_CPU", bound)
    ws = [*weights_of(case.kind, dtype), *weights_of(case.kind, dtype)]
    wanted = [case.kind.project(w) for w in ws]
    places = [(w.data_ptr(), w.stride()) for w in ws]
    case.kind.project_(ws)
    torch.testing.assert_close(ws, wanted, rtol=0, atol=0)
    assert [(w.data_ptr(), w.stride()) for w in ws] == places


@DTYPES
@BOUNDS
@each(PROJECTING)
def test_groups_without_a_norm_to_divide_by_are_what_the_loop_makes_of_them(
    case: Case, bound: int, dtype: torch.dtype, monkeypatch: Any
):
    """Zeros, subnormals, numbers whose squares overflow, infinity and NaN: each beside groups that are to be moved."""
    monkeypatch.setattr(buckets, "_CPU", bound)
    finfo, ws = torch.finfo(dtype), []
    for odd in (0.0, finfo.smallest_normal / 4, finfo.max / 2, torch.inf, torch.nan):
        for axis in (0, 1):
            w = torch.randn(4, 6).to(dtype)
            w.select(axis, 2).fill_(odd)
            ws.append(w)
    wanted = [case.kind.project(w) for w in ws]
    case.kind.project_(ws)
    torch.testing.assert_close(ws, wanted, rtol=0, atol=0, equal_nan=True)


@BOUNDS
@each([case for case in PROJECTING if case.kind.kind == "max_norm"])
def test_on_a_cpu_weights_within_the_ball_are_not_even_written(case: Case, bound: int, monkeypatch: Any):
    monkeypatch.setattr(buckets, "_CPU", bound)
    ws = [w / 1000 for w in weights_of(case.kind, torch.float32)]
    kept, versions = [w.clone() for w in ws], [w._version for w in ws]
    case.kind.project_(ws)
    assert [w._version for w in ws] == versions
    torch.testing.assert_close(ws, kept, rtol=0, atol=0)


@each(PROJECTING)
def test_projections_in_place_can_be_compiled_as_one_graph(case: Case):
    """Whatever they read of weights on a CPU, they do not read of what is traced."""

    def projected(*weights: Tensor) -> Tensor:
        copies = [w.clone() for w in weights]
        case.kind.project_(copies)
        return torch.cat([w.flatten() for w in copies])

    compiles(projected, weights_of(case.kind, torch.float64)[:3], "project_()")


@each([case for case in CONS if case.kind.kind == "max_norm"])
def test_the_norm_of_a_large_group_is_as_exact_as_that_of_a_small_one(case: Case):
    """Of 2 million numbers in float32: a sum that adds them one after another is off by 1e-4."""
    w = torch.rand(4, 512, 1024) + 0.5
    w = w if case.kind.layout == "cell" else w.flatten(0, 1)
    exact = case.kind.violation(w.double())
    torch.testing.assert_close(case.kind.violation(w).double(), exact, rtol=1e-6, atol=0)


@DTYPES
@BOUNDS
@each(SUMMING)
def test_values_is_the_sum_of_the_loop_and_so_is_its_gradient(
    case: Case, bound: int, dtype: torch.dtype, monkeypatch: Any
):
    monkeypatch.setattr(buckets, "_CPU", bound)
    ws = [w.requires_grad_() for w in weights_of(case.kind, dtype)]
    wanted = torch.stack([case.kind.value(w) for w in ws]).sum()
    with torch.no_grad():
        near = 16 * torch.finfo(wanted.dtype).eps
        torch.testing.assert_close(case.kind.values(ws), wanted.detach(), rtol=near, atol=0)
    ours = torch.autograd.grad(case.kind.values(ws), ws)
    torch.testing.assert_close(ours, torch.autograd.grad(wanted, ws), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each([*ADDING, *PROJECTING])
def test_no_temporary_is_larger_than_the_bound(case: Case, dtype: torch.dtype):
    """Weights of 20 MB in float32, large and small: 4 MB at a time. A Gram matrix needs its one weight in float32."""
    ws = [torch.randn(shape).to(dtype) for shape in [(2048, 1024), *[(512, 512)] * 4, *[(256, 256)] * 40]]
    ws = [w.view(4, -1, w.size(1)) for w in ws] if case.kind.layout == "cell" else ws
    gs = [torch.ones_like(w) for w in ws]
    with Counted() as seen, torch.no_grad():
        if case in ADDING:
            case.kind.add_gradients(ws, gs, 0.3)
            case.kind.values(ws)
        else:
            case.kind.project_(ws)
    of_one = 4 * ws[0].numel() if case in ORTHOGONAL and dtype is torch.bfloat16 else 0
    assert seen.largest <= max(4 * 2**20, of_one)
    if case in ADDING:
        wanted = [torch.ones_like(w).add_(case.kind.gradient(w), alpha=0.3) for w in ws]
        assert_added(case.kind, gs, wanted)


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
        ({"penalty": "l1_l2(0.1, 0.1)"}, 3),
        ({"penalty": "l1_l2(1e-9, 0.1)"}, 4),
        ({"constraint": "non_negative"}, 1),
        ({"constraint": "max_norm(0.1)"}, 2 * 13),  # one width of rows after the other
        ({"constraint": "max_norm(100)"}, 2 * 4),
        (
            {
                "target": {"role": ["kernel", "recurrent"]},
                "penalty": {"kind": "orthogonal", "strength": 0.1, "per": "matrix"},
            },
            2 * 27,  # half of them views
        ),
    ],
)
@pytest.mark.parametrize("cells", [2, 100])
def test_a_step_has_as_many_operations_more_for_400_weights_as_for_8(rule: Any, operations: int, cells: int):
    model = nn.ModuleList([nn.GRUCell(3, 4) for _ in range(cells)])
    bare = operations_of_a_step(model)
    regkit.attach(model, {"rules": [rule]})
    assert operations_of_a_step(model) == bare + operations


@each([*ADDING, *PROJECTING])
def test_large_weights_take_a_few_operations_for_each_piece_of_them(case: Case):
    """Eight pieces of 4 MB, for which an operation is a matter of milliseconds."""
    w = torch.randn(4, 2048, 1024)
    w = w if case.kind.layout == "cell" else w.flatten(0, 1)
    with Counted() as seen, torch.no_grad():
        if case in ORTHOGONAL:
            case.kind.add_gradients([w[:2048]], [torch.zeros_like(w[:2048])], 0.3)
        elif case in ADDING:
            case.kind.add_gradients([w], [torch.zeros_like(w)], 0.3)
        else:
            case.kind.project_([w])
    halvings = {"input": 11, "cell": 2}.get(getattr(case.kind, "per", ""), 0)  # of 1024 rows, and of 4 gates
    assert seen.operations <= 8 * (16 + 3 * halvings)


def test_the_loop_over_values_makes_nothing_where_the_weights_are_not():
    """Under a default device of another kind, too."""

    class Plain(Penalty):
        kind: Literal["plain"] = "plain"

        def value(self, w: Tensor) -> Tensor:
            return w.square().sum()

    with torch.device("meta"):
        found = Plain(strength=1).values([torch.full((2, 2), 3.0, device="cpu"), torch.ones(3, device="cpu")])
    assert float(found) == 39
