"""Every activity penalty × every law."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

from regkit import Activity
from regkit.activity import Sequenced, of_output, of_step
from regkit.activity.padding import Lengths, Mask
from tests.support.laws import ACTS, HALVES, REDUCTIONS, Case, Sequences, close, each, numbers, random


def reduced(case: Case, reduction: str, sequences: Sequences, directions: int = 1) -> float:
    """The formula over each sequence alone, without padding; each direction is a state of its own."""
    terms = [case.reference(half) for h in sequences for half in np.split(h, directions, axis=-1)]
    total, count = sum(t.sum() for t in terms), sum(t.size for t in terms)
    return float({"sum": total, "batch": total / len(sequences), "mean": total / max(count, 1)}[reduction])


def activity(h: Any, batch_first: bool = False, directions: int = 1, lengths: Any = None) -> Activity:
    names, valid = ("forward", "backward")[:directions], None if lengths is None else Lengths(torch.tensor(lengths))
    return Activity(of_output(h, batch_first=batch_first, directions=names, wanted=names, valid=valid))


def unpadded(h: Tensor, lengths: Sequence[int]) -> Sequences:
    return [h[:n, b].numpy() for b, n in enumerate(lengths)]


@each(ACTS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("directions", [1, 2])
def test_an_activity_penalty_equals_its_formula_however_the_batch_is_laid_out(
    case: Case, reduction: str, directions: int
) -> None:
    kind, h, lengths = case.kind.model_copy(update={"reduction": reduction}), random((6, 4, 8)), (6, 1, 3, 5)
    whole, cut = (reduced(case, reduction, unpadded(h, n), directions) for n in ((6,) * 4, lengths))
    assert whole != pytest.approx(cut)
    close(kind.value(activity(h, False, directions)), whole)
    close(kind.value(activity(h.transpose(0, 1), True, directions)), whole)
    close(kind.value(activity(h[:, 0], False, directions)), reduced(case, reduction, [h[:, 0].numpy()], directions))
    close(kind.value(activity(h, False, directions, lengths)), cut)
    close(kind.value(activity(h.transpose(0, 1), True, directions, lengths)), cut)
    close(kind.value(activity(pack_padded_sequence(h, lengths, enforce_sorted=False), False, directions)), cut)
    mask = torch.arange(6)[:, None] < torch.tensor(lengths)
    names = ("forward", "backward")[:directions]
    for first, form, where in ((False, h, mask), (True, h.transpose(0, 1), mask.T)):
        masked = of_output(form, batch_first=first, directions=names, wanted=names, valid=Mask(where))
        close(kind.value(Activity(masked)), cut)
    if directions == 1:
        calls = (h.clone().requires_grad_() * 1.0).unbind()
        valid = Lengths(torch.tensor(lengths))
        steps = [of_step(now, calls[t - 1] if t else None, valid, t) for t, now in enumerate(calls)]
        close(kind.value(Activity(steps)).detach(), cut)


@each(ACTS)
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_any_padded_batch_equals_its_packed_form_and_the_formula(case: Case, data: st.DataObject) -> None:
    array = data.draw(numbers(3))
    lengths = data.draw(st.lists(st.integers(1, array.shape[0]), min_size=array.shape[1], max_size=array.shape[1]))
    reduction = data.draw(st.sampled_from(REDUCTIONS))
    kind, h = case.kind.model_copy(update={"reduction": reduction}), torch.from_numpy(array)
    wanted = reduced(case, reduction, unpadded(h, lengths))
    close(kind.value(activity(h, lengths=lengths)), wanted, 1e-9)
    close(kind.value(activity(pack_padded_sequence(h, lengths, enforce_sorted=False))), wanted, 1e-9)


@each(ACTS)
def test_nan_in_the_padding_reaches_neither_value_nor_gradient(case: Case) -> None:
    lengths, clean = (5, 2, 0), random((5, 3, 4))
    padding = ~(torch.arange(5)[:, None] < torch.tensor(lengths))
    leaf = clean.masked_fill(padding.unsqueeze(-1), torch.nan).requires_grad_()
    value = case.kind.value(activity(leaf, lengths=lengths))
    value.backward()
    close(value.detach(), reduced(case, "mean", unpadded(clean, lengths)))
    assert leaf.grad is not None
    assert (leaf.grad[padding] == 0).all()
    assert leaf.grad.isfinite().all()
    assert (leaf.grad[~padding] != 0).any()


def test_padding_is_not_counted_even_where_the_function_of_zero_is_not_zero() -> None:
    h, lengths = random((5, 3, 4)), (5, 2, 1)
    form, sequences = activity(h, lengths=lengths), unpadded(h, lengths)
    close(form.reduce(torch.cos, "sum"), sum(np.cos(s).sum() for s in sequences))
    close(form.reduce(torch.cos), sum(np.cos(s).sum() for s in sequences) / sum(s.size for s in sequences))
    changes = sum(np.cos(np.diff(s, axis=0)).sum() for s in sequences)
    close(form.reduce_pairs(lambda h, before: (h - before).cos(), "sum"), changes)


@each(ACTS)
def test_the_gradient_of_an_activity_penalty_is_finite_at_zero_and_where_there_are_no_neighbours(case: Case) -> None:
    alone, packed = random((1, 3, 4)), pack_padded_sequence(random((1, 3, 4)), [1, 1, 1]).data
    for h in (torch.zeros(5, 3, 4, dtype=torch.float64), alone, packed):
        leaf = h.clone().requires_grad_()
        form = activity(leaf) if h.dim() == 3 else activity(pack_padded_sequence(leaf[None], [1, 1, 1]))
        for reduction in REDUCTIONS:
            value = case.kind.model_copy(update={"reduction": reduction}).value(form)
            assert (value == 0) == (case.kind.sequence or not h.any())
            (gradient,) = torch.autograd.grad(value, leaf, retain_graph=True)
            assert gradient.isfinite().all()


@each([case for case in ACTS if case.kind.sequence])
def test_an_initial_state_is_no_neighbour(case: Case) -> None:
    given_state = random((3, 4))
    for previous in (None, given_state):
        assert case.kind.value(Activity([of_step(random((3, 4), 1), previous, None, 0)])) == 0


@each(ACTS)
@HALVES
def test_half_precision_activity_is_reduced_in_float32(case: Case, dtype: torch.dtype) -> None:
    h = random((256, 8, 64), dtype=dtype, scale=2.0)
    value = case.kind.model_copy(update={"reduction": "sum"}).value(activity(h))
    assert value.dtype == torch.float32
    np.testing.assert_allclose(float(value), reduced(case, "sum", unpadded(h.double(), (256,) * 8)), rtol=1e-4)


@each(ACTS)
def test_an_activity_penalty_never_waits_for_the_device(case: Case) -> None:
    h = torch.empty(5, 3, 4, device="meta")
    lengths = Lengths(torch.tensor([5, 2, 1]).to("meta"))
    valid = lengths.of_sequence(h, batch_first=False)
    assert case.kind.value(Activity([Sequenced(h), Sequenced(h, valid)])).shape == ()


@pytest.mark.parametrize("packed", [False, True])
def test_one_direction_can_be_read_alone(packed: bool) -> None:
    h = random((5, 3, 4))
    output = pack_padded_sequence(h, [5, 5, 5]) if packed else h
    for wanted, half in (("forward", h[..., :2]), ("backward", h[..., 2:])):
        names = ("forward", "backward")
        alone = Activity(of_output(output, batch_first=False, directions=names, wanted=[wanted], valid=None))
        close(alone.reduce(torch.exp, "sum"), half.exp().sum())


@pytest.mark.parametrize("packed", [False, True])
def test_what_a_backward_half_computed_before_h_t_is_h_t_plus_1(packed: bool) -> None:
    h, lengths = random((5, 3, 4)), [5, 3, 1]
    form = activity(pack_padded_sequence(h, lengths), directions=2) if packed else activity(h, False, 2, lengths)
    forward = sum((s[1:, :2] ** 2 * s[:-1, :2]).sum() for s in unpadded(h, lengths))
    backward = sum((s[:-1, 2:] ** 2 * s[1:, 2:]).sum() for s in unpadded(h, lengths))
    for segment, wanted in zip(form.segments, (forward, backward), strict=True):
        close(Activity([segment]).reduce_pairs(lambda now, before: now.square() * before, "sum"), wanted)
