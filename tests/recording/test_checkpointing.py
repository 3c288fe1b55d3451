"""Activation checkpointing: what is recomputed is recorded once, and nothing of it is held that was not held before."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential, set_checkpoint_early_stop

import regkit
from tests.support.cells import AR_TAR, Looped, Sequenced, ar_tar, make
from tests.support.loops import assert_equal_weights

pytestmark = pytest.mark.works_with("Activation checkpointing")

keeping_graph = partial(checkpoint, use_reentrant=False)
reentrant = partial(checkpoint, use_reentrant=True)
REENTRANT = r"rnn runs in a reentrant checkpoint.*use_reentrant=False"


class EachStep(Looped):
    """Each call of the cell in a checkpoint of its own."""

    def outputs(self, x: Tensor) -> Tensor:
        state, outputs = None, []
        for step in x:
            state = keeping_graph(self.rnn, step, state)
            outputs.append(state)
        return torch.stack(outputs)


class WholeLoop(Looped):
    """The whole loop over the cell in one checkpoint."""

    def outputs(self, x: Tensor) -> Tensor:
        return keeping_graph(super().outputs, x)


class Nested(EachStep):
    """The whole loop in a checkpoint, and each call in one within it."""

    def outputs(self, x: Tensor) -> Tensor:
        return keeping_graph(super().outputs, x)


class WholeModel(Sequenced):
    """Layer and head in one checkpoint."""

    def forward(self, x: Tensor) -> Tensor:
        return keeping_graph(super().forward, x)


class Halves(Sequenced):
    """Layer and head as a sequence of segments."""

    def forward(self, x: Tensor) -> Tensor:
        stages = nn.Sequential(Output(self.rnn), nn.Tanh(), self.head)
        return checkpoint_sequential(stages, 2, x, use_reentrant=False)


class Output(nn.Module):
    """What a recurrent layer puts out, without its state."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.inner = rnn

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


class TanhSequenced(Sequenced):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.outputs(x)))


def train(model: nn.Module, batches: list, penalty: Callable[[], Tensor], accumulate: int = 1) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    torch.manual_seed(3)
    for step, (x, y) in enumerate(batches):
        loss = nn.functional.mse_loss(model(x), y) + penalty()
        (loss / accumulate).backward()
        if (step + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()


def by_hand(model: nn.Module) -> Callable[[], Tensor]:
    """A penalty without regkit, of what each call put out."""
    seen: list[Tensor] = []

    def see(module: nn.Module, args: Any, result: Any) -> None:
        seen.append(result[0] if isinstance(module, nn.RNNBase) else result)

    def penalty() -> Tensor:
        outputs = seen[0] if isinstance(model.rnn, nn.RNNBase) else torch.stack(seen)
        seen.clear()
        return ar_tar(outputs)

    model.rnn.register_forward_hook(see)
    return penalty


CASES = [(Looped, EachStep), (Looped, WholeLoop), (Looped, Nested), (Sequenced, WholeModel), (TanhSequenced, Halves)]


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("plain", "checkpointed"), CASES)
def test_a_checkpointed_model_trains_to_the_weights_of_one_without(
    plain, checkpointed, accumulate, early_stop, batches
):
    free, model = make(plain), make(checkpointed)
    train(free, batches, by_hand(free), accumulate)
    attachment = regkit.attach(model, AR_TAR)
    with set_checkpoint_early_stop(early_stop):
        train(model, batches, attachment.penalty, accumulate)
    assert_equal_weights(free, model, 1e-12)


def test_dropout_within_a_checkpoint_is_the_same_when_it_is_recomputed(batches):
    options = {"num_layers": 2, "dropout": 0.5}
    free, model = make(Sequenced, **options), make(WholeModel, **options)
    train(free, batches, by_hand(free))
    train(model, batches, regkit.attach(model, AR_TAR).penalty)
    assert_equal_weights(free, model, 1e-12)


def test_a_recomputation_does_not_count_in_the_time_of_lengths(batches):
    x = batches[0][0]
    gradients = []
    for call in (lambda cell, *args: cell(*args), keeping_graph):
        cell = make(nn.LSTMCell, 3, 4)
        attachment, state = regkit.attach(cell, AR_TAR), None
        with attachment.lengths([5, 3, 1, 2, 4, 5]):
            for chunk in (x[:2], x[2:]):
                for step in chunk:
                    state = call(cell, step, state)
                (state[0].sum() + attachment.penalty()).backward()  # recomputes, in the middle of the sequence
                state = tuple(part.detach() for part in state)
        gradients.append([p.grad for p in cell.parameters()])
    torch.testing.assert_close(*gradients)


def stored_elements(model: nn.Module, penalty: Callable[[], Tensor], x: Tensor) -> int:
    """How many numbers the graph of a forward pass keeps alive."""
    storages: dict[int, int] = {}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)  # or its storage could be given to another
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 8
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(x).square().sum() + penalty()
    loss.backward()
    return sum(storages.values())


def test_a_checkpoint_still_saves_the_memory_that_it_saves(batches):
    x, units = batches[0][0], 5 * 6 * 4
    nothing = lambda: torch.zeros(())  # noqa: E731  # a penalty, as the other is
    without = stored_elements(make(WholeLoop), nothing, x)
    model = make(WholeLoop)
    attachment = regkit.attach(model, AR_TAR)
    within = stored_elements(model, attachment.penalty, x)
    assert within - without <= 2 * units  # h_t of the one penalty, h_t − h_{t−1} of the other: each once
    free = make(Looped)
    attachment = regkit.attach(free, AR_TAR)
    assert within < stored_elements(free, attachment.penalty, x)


def test_nothing_is_held_after_the_backward_pass(batches):
    model = make(WholeModel)
    attachment = regkit.attach(model, AR_TAR)
    outputs: list[weakref.ref[Tensor]] = []
    model.rnn.register_forward_hook(lambda module, args, result: outputs.append(weakref.ref(result[0])))
    (model(batches[0][0]).sum() + attachment.penalty()).backward()
    gc.collect()
    assert len(outputs) == 2  # the pass, and its recomputation
    assert [output() for output in outputs] == [None, None]


class ReentrantLayer(Sequenced):
    def outputs(self, x: Tensor) -> Tensor:
        return reentrant(super().outputs, x)


class ReentrantWithin(Sequenced):
    """A reentrant checkpoint in one that is not."""

    def outputs(self, x: Tensor) -> Tensor:
        return keeping_graph(lambda x: reentrant(super(ReentrantWithin, self).outputs, x), x)


class ReentrantAround(Sequenced):
    """A checkpoint that is not reentrant in one that is."""

    def outputs(self, x: Tensor) -> Tensor:
        return reentrant(lambda x: keeping_graph(super(ReentrantAround, self).outputs, x), x)


@pytest.mark.parametrize("kind", [ReentrantLayer, ReentrantWithin, ReentrantAround])
def test_a_reentrant_checkpoint_is_refused_in_its_first_backward_pass(kind, batches):
    model = make(kind)
    attachment = regkit.attach(model, AR_TAR)
    x = batches[0][0].clone().requires_grad_()
    with torch.no_grad():
        model(x)  # an evaluation
    loss = model(x).sum() + attachment.penalty()
    with pytest.raises(regkit.StepError, match=REENTRANT):
        loss.backward()


def test_weight_rules_do_not_mind_a_reentrant_checkpoint(batches):
    free, model = make(Sequenced), make(ReentrantLayer)
    inputs = [(x.clone().requires_grad_(), y) for x, y in batches]
    for one in (free, model):
        regkit.attach(one, {"rules": [{"penalty": "l2(0.1)"}, {"constraint": "max_norm(0.5)"}]})
        train(one, inputs, lambda: torch.zeros(()))
    assert_equal_weights(free, model, 1e-12)


def test_a_reentrant_checkpoint_elsewhere_in_the_model_does_no_harm(batches):
    class HeadAlone(Sequenced):
        def forward(self, x: Tensor) -> Tensor:
            return reentrant(self.head, self.outputs(x))

    free, model = make(Sequenced), make(HeadAlone)
    train(free, batches, by_hand(free))
    train(model, batches, regkit.attach(model, AR_TAR).penalty)
    assert_equal_weights(free, model, 1e-12)


class Recomputed(torch.autograd.Function):
    """A checkpoint as another library writes it: no graph in the forward pass, one made anew in the backward pass."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(x)
        return run(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor | None]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            ctx.run(x).backward(gradient)
        return None, x.grad


def test_a_checkpoint_of_another_library_that_keeps_no_graph_is_told_at_the_step(batches):
    class Foreign(Sequenced):
        def outputs(self, x: Tensor) -> Tensor:
            return Recomputed.apply(super().outputs, x)

    model = make(Foreign)
    attachment = regkit.attach(model, AR_TAR)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (model(batches[0][0].clone().requires_grad_()).sum() + attachment.penalty()).backward()
    with pytest.raises(regkit.StepError, match=r"recorded nothing.*within a checkpoint that keeps no graph"):
        optimizer.step()


@pytest.mark.works_with("Saved tensors kept on the CPU")
@pytest.mark.parametrize("kind", [Looped, Sequenced])
def test_a_model_whose_saved_tensors_are_kept_on_the_cpu_trains_to_the_same_weights(kind, batches):
    free, model = make(kind), make(kind)
    train(free, batches, by_hand(free))
    attachment = regkit.attach(model, AR_TAR)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for x, y in batches:
        with torch.autograd.graph.save_on_cpu():
            loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        (loss + attachment.penalty()).backward()
        optimizer.step()
    assert_equal_weights(free, model, 1e-12)


@pytest.mark.works_with("torch.compile")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # the compiler's
def test_a_compiled_and_checkpointed_model_trains_to_the_weights_of_one_without(batches):
    free, model = make(Looped), make(WholeLoop)
    train(free, batches, by_hand(free))
    attachment = regkit.attach(model, AR_TAR)
    compiled = torch.compile(model, backend="aot_eager")
    train(compiled, batches, attachment.penalty)
    torch.compiler.reset()
    assert_equal_weights(free, model, 1e-12)
