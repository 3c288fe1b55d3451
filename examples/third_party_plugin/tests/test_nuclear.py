"""The nuclear norm against what others compute, and where it is delicate."""

import pytest
import torch
from torch import Tensor

from regkit_nuclear import NuclearNorm

NUCLEAR = NuclearNorm(strength=1.0)


def of_rank(rank: int, rows: int = 6, columns: int = 4) -> Tensor:
    """A matrix of this rank, up to rounding."""
    torch.manual_seed(0)
    left, right = torch.randn(rows, rank).double(), torch.randn(rank, columns).double()
    return left @ right


@pytest.mark.parametrize("rank", [0, 1, 3, 4])
def test_the_value_is_that_of_torch(rank: int) -> None:
    w = of_rank(rank)
    torch.testing.assert_close(NUCLEAR.value(w), torch.linalg.matrix_norm(w, ord="nuc"))


@pytest.mark.parametrize("rank", [0, 1, 3, 4])
def test_the_gradient_is_the_smallest_subgradient_whatever_the_rank(rank: int) -> None:
    w = of_rank(rank)
    gradient = NUCLEAR.gradient(w)
    # A subgradient G of the norm has <G, W> = ‖W‖_* and no singular value above 1; the smallest has `rank` of them.
    torch.testing.assert_close((gradient * w).sum(), NUCLEAR.value(w))
    singular = torch.linalg.svdvals(gradient)
    torch.testing.assert_close(singular, torch.tensor([1.0] * rank + [0.0] * (4 - rank)).double())


@pytest.mark.parametrize("rank", [0, 1, 3, 4])
def test_autograd_gives_the_same_gradient(rank: int) -> None:
    leaf = of_rank(rank).requires_grad_()
    (gradient,) = torch.autograd.grad(NUCLEAR.value(leaf), leaf)
    torch.testing.assert_close(gradient, NUCLEAR.gradient(leaf.detach()))


def test_the_prox_takes_the_step_off_each_singular_value() -> None:
    w = of_rank(4)
    s = torch.linalg.svdvals(w)
    step = float(s[1:3].mean())
    torch.testing.assert_close(torch.linalg.svdvals(NUCLEAR.prox(w, step)), (s - step).clamp(min=0))
    assert torch.linalg.matrix_rank(NUCLEAR.prox(w, step)) == 2
    torch.testing.assert_close(NUCLEAR.prox(w, 0.0), w)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_in_float32(dtype: torch.dtype) -> None:
    w = of_rank(4).to(dtype)
    assert NUCLEAR.value(w).dtype == NUCLEAR.gradient(w).dtype == torch.float32
    torch.testing.assert_close(NUCLEAR.value(w), NUCLEAR.value(w.float()))
    assert NUCLEAR.prox(w, 0.1).dtype == dtype


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite_are_told_and_not_spread(bad: float) -> None:
    w = of_rank(4)
    w[2, 1] = bad
    assert NUCLEAR.value(w).isnan()
    assert NUCLEAR.gradient(w).count_nonzero() == 0
    torch.testing.assert_close(NUCLEAR.prox(w, 0.1), w, equal_nan=True)
