"""torch.compile: compiled models, cells, steps of training and optimizers train to the same weights as uncompiled ones.

What is compared with is an uncompiled loop without regkit, its penalties written by hand.
"""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from cells import AR_TAR, Looped, Sequenced, ar_tar, make
from loops import assert_equal_weights
from torch import Tensor, nn
from torch._dynamo.utils import counters

import regkit

pytestmark = [
    pytest.mark.works_with("torch.compile"),
    # The compiler looks at .grad of whatever goes into a graph, which torch itself warns of.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    # Inductor, and dynamo where it compiles optimizers, import a module of torch that uses what torch has deprecated.
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]

COMPILED_STEPS: dict[str, CompileStep] = {
    "bound method": lambda optimizer: torch.compile(optimizer.step, backend="aot_eager"),
    "function": lambda optimizer: torch.compile(lambda: optimizer.step(), backend="aot_eager"),
}
COMPILED = COMPILED_STEPS["bound method"]  # rounds otherwise than the uncompiled one: it is compared with itself
INDUCTOR = "inductor" if shutil.which("g++") else "aot_eager"
RAMP = {"kind": "linear", "start": 0.5, "end": 1.5, "steps": 3}
SPEC = {
    "rules": [
        {**AR_TAR["rules"][0], "schedule": RAMP},
        AR_TAR["rules"][1],
        {"name": "l2", "penalty": "l2(0.05)", "schedule": RAMP},
        {"name": "ball", "target": {"role": "recurrent"}, "constraint": "max_norm(0.6)"},
    ]
}
MODELS = [(Looped, nn.GRUCell), (Sequenced, nn.LSTM)]
Batches = list[tuple[Tensor, Tensor]]
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]
CompileStep = Callable[[torch.optim.Optimizer], Callable[..., object]]


@pytest.fixture
def batches(batches: Batches) -> Batches:
    """Short ones: of a loop over a cell, each step is compiled."""
    return [(x[:3], y[:3]) for x, y in batches]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=torch.tensor(0.02, dtype=torch.float64))


def train_by_hand(
    model: nn.Module,
    batches: Batches,
    optimizer: MakeOptimizer = sgd,
    compile_step: CompileStep = lambda optimizer: optimizer.step,
) -> None:
    stepper = optimizer(model)
    update = compile_step(stepper)
    for step, (x, y) in enumerate(batches):
        factor = min(0.5 + step / 3, 1.5)
        h = model.outputs(x)
        decay = 0.05 * factor * sum(p.square().sum() for p in model.rnn.parameters())
        ar, tar = 2.0 * factor * h.square().mean(), (h[1:] - h[:-1]).square().mean()
        stepper.zero_grad()
        (nn.functional.mse_loss(model.head(h), y) + ar + tar + decay).backward()
        update()
        with torch.no_grad():
            for name, weight in model.rnn.named_parameters():
                if name.startswith("weight_hh"):
                    weight.mul_((0.6 / weight.norm(dim=1, keepdim=True)).clamp(max=1))


def train_with(
    attachment: regkit.Attachment,
    forward: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    step: Callable[[], object] | None = None,
) -> None:
    for x, y in batches:
        optimizer.zero_grad()
        (nn.functional.mse_loss(forward(x), y) + attachment.penalty()).backward()
        (step or optimizer.step)()


def compiled(model: nn.Module, in_place: bool, backend: str = "aot_eager") -> nn.Module:
    fullgraph = isinstance(model, Looped)  # of an nn.LSTM, torch makes no graph
    if in_place:
        model.compile(backend=backend, fullgraph=fullgraph)
        return model
    return torch.compile(model, backend=backend, fullgraph=fullgraph)


@pytest.mark.parametrize("attach_when", ["before compile", "after compile", "after the first call"])
@pytest.mark.parametrize("in_place", [False, True])
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


@pytest.mark.parametrize(("kind", "context"), [(Looped, "lengths"), (Sequenced, "lengths"), (Sequenced, "mask")])
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
    store = first._rules.recorders[0]._calls
    first.detach()
    for _ in range(2):
        forward(x)
    assert not store.records
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


@pytest.mark.works_with("torch.compile: optimizers")
@pytest.mark.parametrize("optimizer", [sgd, adam])
@pytest.mark.parametrize("how", COMPILED_STEPS)
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
