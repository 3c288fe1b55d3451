"""torch.compile: compiled steps, of training and of optimizers, train to the same weights as uncompiled ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import regkit
from tests.support.cells import AR_TAR, Looped, Sequenced, make
from tests.support.compiling import (
    COMPILED,
    COMPILED_STEPS,
    MODELS,
    SPEC,
    WARNINGS,
    Batches,
    adam,
    compiled,
    sgd,
    short,
    train_by_hand,
    train_with,
)
from tests.support.loops import assert_equal_weights

pytestmark = [pytest.mark.slow, *WARNINGS]


@pytest.fixture
def batches(batches: Batches) -> Batches:
    return short(batches)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.works_with("torch.compile")
@pytest.mark.parametrize(("kind", "layer"), MODELS)
def test_a_whole_compiled_step_of_training_is_right_and_is_compiled_once(kind, layer, batches):
    by_hand, model = make(kind, layer), make(kind, layer)
    train_by_hand(by_hand, batches, adam, COMPILED)
    attachment, optimizer = regkit.attach(model, SPEC), adam(model)

    @torch.compile(backend="aot_eager")
    def train_step(x: Tensor, y: Tensor) -> None:
        loss = nn.functional.mse_loss(model(x), y) + attachment.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    train_step(*batches[0])
    train_step(*batches[1])  # gradients exist from the second on, which torch itself compiles anew
    with torch._dynamo.config.patch(error_on_recompile=True):
        for x, y in batches[2:]:
            train_step(x, y)
    assert_equal_weights(by_hand, model)


@pytest.mark.works_with("torch.compile: optimizers")
@pytest.mark.parametrize(("how", "optimizer"), [("bound method", sgd), ("bound method", adam), ("function", adam)])
def test_a_compiled_optimizer_trains_to_the_weights_of_a_loop_by_hand(how, optimizer, batches):
    by_hand, model = make(Sequenced), make(Sequenced)
    train_by_hand(by_hand, batches, optimizer, COMPILED)
    attachment, stepper = regkit.attach(model, SPEC), optimizer(model)
    step = COMPILED_STEPS[how](stepper)
    train_with(attachment, model, stepper, batches[:1], step)
    with torch._dynamo.config.patch(error_on_recompile=optimizer is adam):  # SGD's first momentum is torch's own anew
        train_with(attachment, model, stepper, batches[1:], step)
    assert_equal_weights(by_hand, model)
    assert attachment.step_count == len(batches)


@pytest.mark.works_with("torch.compile: optimizers")
def test_a_compiled_optimizer_with_a_closure_trains_to_the_weights_of_a_loop_by_hand(batches):
    by_hand, model = make(Sequenced), make(Sequenced)
    train_by_hand(by_hand, batches, adam, COMPILED)
    attachment, optimizer = regkit.attach(model, SPEC), adam(model)
    step = COMPILED(optimizer)
    for x, y in batches:

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y) + attachment.penalty()
            loss.backward()
            return loss

        step(closure)
    assert_equal_weights(by_hand, model)


@pytest.mark.works_with("torch.compile: optimizers")
def test_a_forgotten_penalty_is_told_in_a_compiled_step_too(batches):
    model = make(Looped)
    attachment, optimizer = regkit.attach(model, AR_TAR), sgd(model)
    step = COMPILED(optimizer)
    compiled(model, False)(batches[0][0]).sum().backward()
    with pytest.raises(regkit.StepError, match="not consumed"):
        step()
    assert attachment.step_count == 0


@pytest.mark.works_with("torch.compile: optimizers")
def test_a_compiled_step_adds_the_penalty_behind_a_hook_of_the_optimizer_that_clips_and_is_compiled_once():
    cell = nn.RNNCell(3, 4).double()
    attachment = regkit.attach(cell, {"rules": [{"penalty": "l2(0.1)"}]})
    optimizer = torch.optim.SGD(cell.parameters(), lr=0.0)

    def clip(*_: object) -> None:
        nn.utils.clip_grad_norm_(list(cell.parameters()), 0.1)

    optimizer.register_step_pre_hook(clip)
    step = COMPILED(optimizer)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            for p in cell.parameters():
                p.grad = torch.ones_like(p)
            step()
    clipped = 0.1 / sum(p.numel() for p in cell.parameters()) ** 0.5
    for p in cell.parameters():
        torch.testing.assert_close(p.grad, clipped + 0.2 * p.detach(), rtol=1e-5, atol=1e-7)
    assert attachment.step_count == 3
