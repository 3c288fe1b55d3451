"""The watchdog is quiet: all that moves weights between two backward passes and is no unheard update."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

import regkit
from regkit.engine.watchdog import _TIMES
from tests.support.counting import OURS, calls
from tests.support.loops import Batches, assert_equal_weights, loss_of, train

pytestmark = pytest.mark.works_with("Updates without a torch optimizer")

L2 = {"rules": [{"name": "l2", "penalty": "l2(0.1)"}]}
RATE = 0.1


def backward(model: nn.Module, batches: Batches, times: int = 1) -> None:
    for x, y in (batches * times)[:times]:
        loss_of(model, x, y).backward()


@contextmanager
def equal_to_decay(make_model: Callable[[], nn.Module], batches: Batches) -> Iterator[list[nn.Module]]:
    """Two models to be trained alike, with optimizers of `sgd`: one of them has its decay from regkit."""
    models = [make_model(), make_model()]
    attachment = regkit.attach(models[1], L2)
    yield models
    assert_equal_weights(*models)
    assert attachment.step_count > 0


def sgd(model: nn.Module, of: list[nn.Module]) -> SGD:
    decay = 0.2 if model is of[0] else 0.0
    return SGD(
        [{"params": model.rnn.parameters(), "weight_decay": decay}, {"params": model.head.parameters()}], lr=RATE
    )


@pytest.mark.parametrize("ascents", [1, 2])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("through_data", [False, True])
def test_sharpness_aware_steps_of_a_few_ascents(ascents, accumulation, through_data, make_model, batches):
    with equal_to_decay(make_model, batches) as models:
        for model in models:
            optimizer = sgd(model, models)
            for _ in range(3):
                kept = [p.detach().clone() for p in model.parameters()]
                for _ in range(ascents):
                    model.zero_grad()
                    backward(model, batches, accumulation)
                    with torch.no_grad():
                        for p in model.parameters():
                            (p.data if through_data else p).add_(0.05 * p.grad)
                model.zero_grad()
                backward(model, batches, accumulation)
                with torch.no_grad():
                    for p, old in zip(model.parameters(), kept, strict=True):
                        if through_data:
                            p.data = old
                        else:
                            p.copy_(old)
                optimizer.step()


def test_many_backward_passes_to_a_step(make_model, batches):
    with equal_to_decay(make_model, batches) as models:
        for model in models:
            optimizer = sgd(model, models)
            for _ in range(2):
                optimizer.zero_grad()
                backward(model, batches, 20)
                optimizer.step()


def test_two_moves_among_many_backward_passes_to_a_step_are_two(make_model, batches):
    model = make_model()
    attachment = regkit.attach(model, L2)
    optimizer = SGD(model.parameters(), lr=RATE)
    for index in range(20):
        if index in (10, 12):
            with torch.no_grad():
                model.rnn.weight_ih_l0.add_(0.01)
        backward(model, batches)
    optimizer.step()
    assert attachment.step_count == 1


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
@pytest.mark.parametrize("threads", [False, True])
def test_a_line_search_that_moves_the_weights_within_one_step(threads, search, make_model, batches):
    """On a GPU the backward pass, and so the watchdog, runs in a thread of its own: here one is made."""
    model = make_model()
    attachment = regkit.attach(model, L2)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=10, line_search_fn=search)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, *batches[0])
        if threads:
            in_another_thread(loss.backward)
        else:
            loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert attachment.step_count == 3


def in_another_thread(run: Callable[[], None]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        pool.submit(run).result()


def test_steps_that_a_grad_scaler_skips(make_model, batches):
    model = make_model()
    attachment = regkit.attach(model, L2)
    optimizer = SGD(model.parameters(), lr=RATE)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for _ in range(6):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, *batches[0]) * float("inf")).backward()
        scaler.step(optimizer)
        scaler.update()
    assert attachment.step_count == 0


@pytest.mark.parametrize("part", ["model", "submodule"])
@pytest.mark.parametrize("options", [{}, {"strict": False}, {"assign": True}], ids=str)
def test_states_loaded_between_backward_passes(options, part, make_model, batches):
    model = make_model()
    regkit.attach(model, L2)
    for index in range(6):
        backward(model, batches)
        target = model if part == "model" else model.rnn
        target.load_state_dict({key: value + index for key, value in target.state_dict().items()}, **options)


def test_a_checkpoint_restored_with_its_optimizer_over_and_over(make_model, batches):
    model = make_model()
    regkit.attach(model, L2)
    optimizer = Adam(model.parameters())
    train(model, optimizer, batches)
    checkpoint = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for _ in range(5):
        backward(model, batches)
        model.load_state_dict(checkpoint[0])
        optimizer.load_state_dict(checkpoint[1])
    train(model, optimizer, batches)


def test_initializations_that_are_announced(make_model, batches):
    model = make_model()
    attachment = regkit.attach(model, L2)
    for _ in range(6):
        backward(model, batches)
        nn.init.orthogonal_(model.rnn.weight_ih_l0)
        model.rnn.reset_parameters()
        attachment.weights_changed()


def test_parameters_that_are_replaced_and_announced_are_watched_anew(make_model, batches):
    model = make_model()
    attachment = regkit.attach(model, L2)
    backward(model, batches)
    model.rnn.weight_ih_l0 = nn.Parameter(model.rnn.weight_ih_l0.detach().clone())
    attachment.weights_changed()
    for _ in range(_TIMES):
        backward(model, batches)
        model.rnn.weight_ih_l0.data += 0.1
    with pytest.raises(regkit.StepError, match="weight_ih_l0 changed"):
        backward(model, batches)


def test_averages_swapped_in_for_evaluation_and_out_again(make_model, batches):
    with equal_to_decay(make_model, batches) as models:
        for model in models:
            optimizer = sgd(model, models)
            average = [p.detach().clone() for p in model.parameters()]
            for x, y in batches * 2:
                train(model, optimizer, [(x, y)])
                with torch.no_grad():
                    for mean, p in zip(average, model.parameters(), strict=True):
                        mean.lerp_(p, 0.1)
                    kept = [p.detach().clone() for p in model.parameters()]
                    for values in (average, kept):
                        for p, value in zip(model.parameters(), values, strict=True):
                            p.copy_(value)
                        model(x)


def test_two_optimizers_that_take_turns(make_model, batches):
    """As a generator and a discriminator do: several steps of one to each of the other."""
    model = nn.ModuleDict({"one": make_model(), "other": make_model()})
    attachment = regkit.attach(model, L2)
    optimizers = {name: Adam(part.parameters()) for name, part in model.items()}
    for name in ("other", "other", "other", "one", "other", "other", "other", "one"):
        model.zero_grad()
        (loss_of(model["one"], *batches[0]) + loss_of(model["other"], *batches[1])).backward()
        optimizers[name].step()
    assert attachment.step_count > 4


def test_an_attachment_that_is_restricted_to_one_optimizer(make_model, batches):
    model = make_model()
    one, other = (SGD(model.parameters(), lr=RATE) for _ in range(2))
    attachment = regkit.attach(model, L2, optimizer=one)
    for _ in range(3):
        for _ in range(3):
            train(model, other, batches)
        train(model, one, batches[:1])
    assert attachment.step_count == 3


@pytest.mark.parametrize("way", ["no_grad", "inference_mode", "with gradients"])
def test_evaluation_passes(way, make_model, batches):
    model = make_model()
    regkit.attach(model, L2)
    optimizer = SGD(model.parameters(), lr=RATE)
    for _ in range(4):
        train(model, optimizer, batches)
        model.eval()
        if way == "with gradients":
            model(batches[0][0])
        else:
            with getattr(torch, way)():
                model(batches[0][0])
        model.train()


def test_saliency_by_autograd_grad(make_model, batches):
    model = make_model()
    regkit.attach(model, L2)
    for x, _ in batches * 5:
        x = x.clone().requires_grad_()
        torch.autograd.grad(model(x).sum(), [x, model.rnn.weight_ih_l0])


def test_conversions_of_a_model_between_backward_passes_each_of_which_loses_something(make_model, batches):
    model = make_model()
    nn.init.normal_(model.rnn.weight_ih_l0)
    regkit.attach(model, L2)
    x, y = batches[0]
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float32):
        model.to(dtype).zero_grad()
        loss_of(model, x.to(dtype), y.to(dtype)).backward()
    model.double().to_empty(device="cpu")
    make_again = copy.deepcopy(make_model().state_dict())
    model.load_state_dict(make_again)
    train(model, SGD(model.parameters(), lr=RATE), batches)


def test_a_model_that_is_sent_to_another_process_makes_torch_warn_of_nothing(make_model):
    """torch.multiprocessing warns of hooks on parameters that it leaves out; warnings are errors here."""
    import io
    from multiprocessing.reduction import ForkingPickler

    import torch.multiprocessing  # registers how tensors are sent

    assert torch.multiprocessing
    model = make_model()
    regkit.attach(model, L2)
    ForkingPickler(io.BytesIO()).dump(model.share_memory())


def test_the_watch_costs_next_to_nothing():
    """The functions called in a backward pass: a few of regkit's, and none of what keeps out a compiler that is not."""
    model = nn.LSTM(8, 16)
    attachment = regkit.attach(model, L2)
    optimizer = SGD(model.parameters(), lr=0.0)

    def called(files: tuple[str, ...]) -> int:
        loss = model(torch.randn(4, 2, 8))[0].sum()
        number = calls(loss.backward, files)
        optimizer.step()
        return number

    everywhere = ("",)
    called(everywhere)
    assert 0 < called(OURS) <= 6
    armed = called(everywhere)
    attachment._watchdog.disarm()
    attachment._watchdog._off = True
    assert called(OURS) == 0
    assert 0 < armed - called(everywhere) <= 8


@pytest.mark.parametrize("way", ["in place", "through data"])
@pytest.mark.parametrize("accumulation", [9, 40])
def test_noise_on_weights_under_accumulation(accumulation, way, make_model, batches):
    """Weights are moved before each forward pass and put back behind its backward pass; gradients add up."""
    with equal_to_decay(make_model, batches) as models:
        for model in models:
            optimizer, source = sgd(model, models), torch.Generator().manual_seed(5)
            for _ in range(3):
                optimizer.zero_grad()
                for x, y in (batches * accumulation)[:accumulation]:
                    kept = [p.detach().clone() for p in model.parameters()]
                    with torch.no_grad():
                        for p in model.parameters():
                            noise = 0.05 * torch.randn(p.shape, generator=source, dtype=p.dtype)
                            (p if way == "in place" else p.data).add_(noise)
                    loss_of(model, x, y).backward()
                    with torch.no_grad():
                        for p, old in zip(model.parameters(), kept, strict=True):
                            (p if way == "in place" else p.data).copy_(old)
                optimizer.step()
