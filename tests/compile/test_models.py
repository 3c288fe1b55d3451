"""torch.compile: compiled models and cells train to the same weights as uncompiled ones.

What is compared with is an uncompiled loop without regkit, its penalties written by hand.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import regkit
from tests.support.cells import AR_TAR, Looped, Sequenced, ar_tar, make
from tests.support.compiling import (
    INDUCTOR,
    MODELS,
    SPEC,
    WARNINGS,
    Batches,
    compiled,
    sgd,
    short,
    train_by_hand,
    train_with,
)
from tests.support.loops import assert_equal_weights
from tests.support.versions import needs_torch

pytestmark = [pytest.mark.slow, pytest.mark.works_with("torch.compile"), *WARNINGS]


@pytest.fixture
def batches(batches: Batches) -> Batches:
    return short(batches)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("attach_when", "in_place"),
    [
        ("before compile", False),
        ("after compile", False),
        ("after the first call", False),
        ("after compile", True),
        ("after the first call", True),
    ],
)
@pytest.mark.parametrize(("kind", "layer"), MODELS)
def test_a_compiled_model_trains_to_the_weights_of_a_loop_by_hand(kind, layer, in_place, attach_when, batches):
    by_hand, model = make(kind, layer), make(kind, layer)
    train_by_hand(by_hand, batches)
    if attach_when == "before compile":
        attachment = regkit.attach(model, SPEC)
        forward = compiled(model, in_place)
    else:
        forward = compiled(model, in_place)
        if attach_when == "after the first call":
            forward(batches[0][0]).sum().backward()  # forward and backward pass are compiled, without a hook
        attachment = regkit.attach(model, SPEC)
    train_with(attachment, forward, sgd(model), batches)
    assert_equal_weights(by_hand, model)


@pytest.mark.parametrize(("kind", "layer"), [(Looped, nn.LSTMCell), (Sequenced, nn.GRU)])
def test_a_model_compiled_by_inductor_trains_to_the_weights_of_a_loop_by_hand(kind, layer, batches):
    by_hand, model = make(kind, layer), make(kind, layer)
    train_by_hand(by_hand, batches)
    forward = compiled(model, False, INDUCTOR)
    train_with(regkit.attach(model, SPEC), forward, sgd(model), batches)
    assert_equal_weights(by_hand, model)


def test_rules_attached_to_the_compiled_wrapper_are_those_of_the_model(batches):
    by_hand, model = make(Looped), make(Looped)
    train_by_hand(by_hand, batches)
    wrapper = compiled(model, False)
    train_with(regkit.attach(wrapper, SPEC), wrapper, sgd(model), batches)
    assert_equal_weights(by_hand, model)


@pytest.mark.parametrize(("kind", "layer"), MODELS)
def test_nothing_is_compiled_anew_as_factors_batches_in_a_step_and_lengths_change(kind, layer, batches):
    model, eager = make(kind, layer), make(kind, layer)
    forward = compiled(model, False)
    ours, theirs = regkit.attach(model, SPEC), regkit.attach(eager, SPEC)

    def train(forward: nn.Module, attachment: regkit.Attachment, optimizer: torch.optim.Optimizer) -> None:
        for passes in (1, 2, 4, 3):
            optimizer.zero_grad()
            for x, y in batches[:passes]:
                with attachment.lengths([3, min(passes, 3), 2, 1, 3, 3]):
                    first = forward(x)
                loss = nn.functional.mse_loss(first, y) + nn.functional.mse_loss(forward(x), y)
                ((loss + attachment.penalty()) / passes).backward()
            optimizer.step()

    train(eager, theirs, sgd(eager))
    forward(batches[0][0])  # all that is to be compiled
    ours.discard()
    with torch._dynamo.config.patch(error_on_recompile=True):
        train(forward, ours, sgd(model))
    assert_equal_weights(eager, model)


@pytest.mark.parametrize("cell", [nn.RNNCell, nn.LSTMCell])
@pytest.mark.parametrize("around", ["lengths", "mask", "nothing"])
def test_a_compiled_cell_in_an_uncompiled_loop_counts_its_time(around, cell, batches):
    ours, theirs = cell(3, 4).double(), cell(3, 4).double()
    theirs.load_state_dict(ours.state_dict())
    ours.compile(backend="aot_eager", fullgraph=True)
    attachments = regkit.attach(ours, AR_TAR), regkit.attach(theirs, AR_TAR)
    lengths = torch.tensor([3, 1, 3, 2, 2, 3])

    def penalty(cell: nn.Module, attachment: regkit.Attachment, x: Tensor) -> Tensor:
        state = None
        with attachment.lengths(lengths if around == "lengths" else torch.full((6,), 3)):
            for time, step in enumerate(x):
                if around == "mask":
                    with attachment.mask(time < lengths):
                        state = cell(step, state)
                else:
                    state = cell(step, state)
        return attachment.penalty()

    x = batches[0][0]
    expected = penalty(theirs, attachments[1], x)
    torch.testing.assert_close(penalty(ours, attachments[0], x), expected)
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(penalty(ours, attachments[0], x), expected)


@pytest.mark.parametrize(
    ("kind", "context"),
    [
        (Looped, "lengths"),
        (Sequenced, "lengths"),
        pytest.param(
            Sequenced,
            "mask",
            marks=needs_torch("2.13", "the compiler fails where a function returns a context manager"),
        ),
    ],
)
def test_lengths_and_masks_may_be_given_within_compiled_code(kind, context, batches):
    model = make(kind)
    attachment = regkit.attach(model, AR_TAR)
    within = getattr(attachment, context)

    def forward(x: Tensor, valid: Tensor) -> Tensor:
        with within(valid):
            return model(x)

    lengths = torch.tensor([3, 1, 3, 2, 2, 3])
    valid = lengths if context == "lengths" else torch.arange(3)[:, None] < lengths
    forward(batches[0][0], valid)
    expected = attachment.penalty()
    torch.compile(forward, backend="aot_eager")(batches[0][0], valid)
    torch.testing.assert_close(attachment.penalty(), expected)


def test_compiled_code_records_nothing_after_detach_and_for_the_next_attachment_alone(batches):
    model, by_hand = make(Looped), make(Looped)
    forward = compiled(model, False)
    x = batches[0][0]
    first = regkit.attach(model, SPEC)
    forward(x)
    store = first._rules.recorders[0].calls
    first.detach()
    for _ in range(2):
        forward(x)
    assert not store.placed()
    kept = weakref.ref(store)
    del first, store
    gc.collect()
    assert kept() is None

    train_by_hand(by_hand, batches)
    train_with(regkit.attach(model, SPEC), forward, sgd(model), batches)
    assert_equal_weights(by_hand, model)


def test_a_code_that_is_compiled_in_part_before_attach_misses_no_batch():
    """Compiled for one shape before attach and for another after it, and both in one step."""
    model = make(Looped)
    forward = torch.compile(model, backend="aot_eager", dynamic=False)
    short, long = torch.randn(2, 6, 3, dtype=torch.float64), torch.randn(4, 6, 3, dtype=torch.float64)
    forward(short)
    attachment = regkit.attach(model, AR_TAR)
    forward(long)
    forward(short)
    outputs = [model.outputs(x) for x in (long, short)]
    attachment.discard()
    forward(long)
    forward(short)
    pairs = torch.cat([h[1:] - h[:-1] for h in outputs])
    expected = 2.0 * torch.cat(outputs).square().mean() + pairs.square().mean()
    torch.testing.assert_close(attachment.penalty(), expected)


def test_evaluation_of_a_compiled_model_records_nothing(batches):
    model = make(Looped)
    attachment = regkit.attach(model, AR_TAR)
    forward = compiled(model, False)
    with torch.no_grad():
        forward(batches[0][0])
    assert not attachment._rules.recorders[0].records
    forward(batches[1][0])
    torch.testing.assert_close(attachment.penalty(), ar_tar(model.outputs(batches[1][0])))
