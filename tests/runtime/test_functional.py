"""torch.func, tracing and exporting: they work, or an error says what to do; nothing of theirs stays in the store."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map

import regkit
from tests.support.cells import AR_TAR, Looped, Sequenced, ar_tar, make
from tests.support.loops import assert_equal_weights, rnn_groups

pytestmark = [
    # torch's own: tracing is deprecated; a cell has no batching rule; what is exported goes through the tracer.
    pytest.mark.filterwarnings("ignore:`torch.jit.*is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop because:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*:torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:The tensor attributes self.rnn._flat_weights:UserWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

KINDS = pytest.mark.parametrize("kind", [Looped, Sequenced])
TRANSFORMED = r"rnn runs within a transform of torch\.func.*attachment\.detached\(\).*torch\.no_grad\(\)"
UNRECORDED = r"'ar'.* on rnn recorded nothing.*as a program that was traced or exported"
WEIGHTS = {"rules": [{"penalty": "l2(0.05)"}, {"target": {"role": "recurrent"}, "constraint": "max_norm(0.6)"}]}


@pytest.fixture
def x(batches: list) -> Tensor:
    return batches[0][0][:3]


def stored(attachment: regkit.Attachment) -> int:
    return sum(len(recorder.records) for recorder in attachment._rules.recorders)


def by_hand(model: nn.Module, x: Tensor) -> Tensor:
    h = model.outputs(x)
    return model.head(h).square().mean() + ar_tar(h)


def is_unharmed(attachment: regkit.Attachment, model: nn.Module, x: Tensor) -> bool:
    """Whether the store is empty, and a step of training is as it would be by hand."""
    free = make(type(model), type(model.rnn))
    free.load_state_dict(model.state_dict())
    assert stored(attachment) == 0
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.1) for one in (free, model)]
    for one, optimizer in zip((free, model), optimizers, strict=True):
        optimizer.zero_grad()
        loss = by_hand(one, x) if one is free else one(x).square().mean() + attachment.penalty()
        loss.backward()
        optimizer.step()
    assert_equal_weights(free, model)
    return True


class Leaky(nn.RNNCell):
    """A cell of the user's own, of plain operations: torch.fx traces through it, and vmap knows every one of them."""

    def forward(self, x: Tensor, hx: Tensor | None = None) -> Tensor:
        new = nn.functional.linear(x, self.weight_ih, self.bias_ih)
        hx = torch.zeros_like(new) if hx is None else hx
        return 0.5 * hx + 0.5 * torch.tanh(new + hx @ self.weight_hh.T)


# --- torch.func ------------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.works_with("torch.func")
def test_a_functional_call_is_penalized_at_the_weights_it_was_given(kind, x):
    model, free = make(kind), make(kind)
    attachment = regkit.attach(model, AR_TAR)
    fast = {name: (p.detach() * 0.7).requires_grad_() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in free.parameters():
            p.mul_(0.7)
    loss = functional_call(model, fast, x).square().mean() + attachment.penalty()
    ours = torch.autograd.grad(loss, list(fast.values()))
    theirs = torch.autograd.grad(by_hand(free, x), list(free.parameters()))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.works_with("torch.func")
def test_weights_learned_in_an_inner_step_carry_the_penalty_to_the_outer_one(x):
    """Meta-learning: the gradient of a step through a step."""
    gradients = []
    for attached in (False, True):
        model = make(Looped)
        attachment = regkit.attach(model, AR_TAR) if attached else None
        names = [name for name, _ in model.named_parameters()]
        inner = functional_call(model, dict(model.named_parameters()), x).square().mean()
        inner = inner + (attachment.penalty() if attachment else ar_tar(model.outputs(x)))
        slopes = torch.autograd.grad(inner, list(model.parameters()), create_graph=True)
        fast = {n: p - 0.1 * g for n, p, g in zip(names, model.parameters(), slopes, strict=True)}
        outer = functional_call(model, fast, x).square().mean()
        if attachment:
            outer = outer + attachment.penalty()
        else:
            other = make(Looped)
            calls: list[Tensor] = []
            other.rnn.register_forward_hook(lambda module, args, h, calls=calls: calls.append(h))
            functional_call(other, fast, x)
            outer = outer + ar_tar(torch.stack(calls))
        gradients.append(torch.autograd.grad(outer, list(model.parameters())))
    torch.testing.assert_close(*gradients)


def transformed(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """Calls within transforms, by what they are called."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, dict(parameters), x).square().mean()

    def ensemble() -> Tensor:
        state = stack_module_state([make(Looped, type(model.rnn)) for _ in range(3)])
        return vmap(lambda p, b: functional_call(model, (p, b), x))(*state)

    return {
        "grad": lambda: grad(loss)(parameters, x),
        "grad of each sample": lambda: vmap(grad(loss), in_dims=(None, 1))(parameters, x[:, :, None]),
        "vmap over an ensemble": ensemble,
        "vmap over inputs": lambda: vmap(model, in_dims=2, out_dims=2)(x[:, :, None].expand(-1, -1, 2, -1)),
        "jvp": lambda: jvp(lambda x: model(x).sum(), (x,), (torch.ones_like(x),)),
    }


@pytest.mark.works_with("torch.func")
@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("grad", nn.LSTMCell),
        ("grad of each sample", Leaky),
        ("vmap over an ensemble", nn.GRUCell),
        ("vmap over inputs", nn.RNNCell),
        ("jvp", nn.GRUCell),
    ],
)
def test_a_transform_is_refused_at_once_and_runs_detached_or_without_gradients(name, cell, x):
    model = make(Looped, cell)
    bare = transformed(model, x)[name]()
    attachment = regkit.attach(model, AR_TAR)
    call = transformed(model, x)[name]
    with pytest.raises(regkit.StepError, match=TRANSFORMED):
        call()
    with attachment.detached():
        torch.testing.assert_close(call(), bare)
    if "grad" not in name:  # which asks for gradients, whatever stands around it
        with torch.no_grad():
            torch.testing.assert_close(call(), tree_map(Tensor.detach, bare))
    assert is_unharmed(attachment, model, x)


@pytest.mark.works_with("torch.func")
def test_weight_rules_do_not_mind_a_transform(x):
    """Gradients from torch.func, written into .grad, and an optimizer's step."""
    free, model = make(Looped), make(Looped)
    regkit.attach(model, WEIGHTS)
    for one, decay in ((free, 0.1), (model, 0.0)):
        optimizer = torch.optim.SGD(rnn_groups(one, decay), lr=0.1)
        for _ in range(3):
            parameters = {name: p.detach() for name, p in one.named_parameters()}
            slopes = grad(lambda p, one=one: functional_call(one, p, x).square().mean())(parameters)
            for name, p in one.named_parameters():
                p.grad = slopes[name]
            optimizer.step()
            if one is free:
                with torch.no_grad():
                    w = one.rnn.weight_hh
                    w.mul_((0.6 / w.norm(dim=1, keepdim=True)).clamp(max=1))
    assert_equal_weights(free, model)


# --- traces and exports ----------------------------------------------------------------------------------------------

PROGRAMS = {
    "jit.trace": lambda model, x: torch.jit.trace(model, x),
    "torch.export": lambda model, x: torch.export.export(model, (x,), strict=False).module(),
    "torch.export, strict": lambda model, x: torch.export.export(model, (x,), strict=True).module(),
}


@KINDS
@pytest.mark.works_with("torch.jit.trace, torch.export, torch.fx")
@pytest.mark.parametrize("how", PROGRAMS)
def test_a_program_is_made_of_an_attached_model_and_its_store_is_left_alone(how, kind, x):
    model = make(kind)
    attachment = regkit.attach(model, AR_TAR)
    program = PROGRAMS[how](model, x)
    assert stored(attachment) == 0
    with torch.no_grad():
        torch.testing.assert_close(program(x), model(x))
    with attachment.detached():
        torch.testing.assert_close(PROGRAMS[how](model, x)(x), program(x))
    assert is_unharmed(attachment, model, x)


@KINDS
@pytest.mark.works_with("torch.jit.trace, torch.export, torch.fx")
@pytest.mark.parametrize("how", PROGRAMS)
def test_a_program_that_is_trained_where_no_activity_is_seen_is_an_error(how, kind, x):
    model = make(kind)
    attachment = regkit.attach(model, AR_TAR)
    program = PROGRAMS[how](model, x)
    optimizer = torch.optim.SGD(program.parameters(), lr=0.1)
    (program(x).square().mean() + attachment.penalty()).backward()
    with pytest.raises(regkit.StepError, match=UNRECORDED):
        optimizer.step()


@KINDS
@pytest.mark.works_with("torch.jit.trace, torch.export, torch.fx")
@pytest.mark.parametrize("how", PROGRAMS)
def test_a_program_that_is_trained_obeys_weight_rules(how, kind, x):
    trained = []
    for make_program in (lambda model, x: model, PROGRAMS[how]):
        model = make(kind)
        regkit.attach(model, WEIGHTS)
        program = make_program(model, x)
        optimizer = torch.optim.SGD(program.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            program(x).square().mean().backward()
            optimizer.step()
        trained.append(model)
    assert_equal_weights(*trained)


@pytest.mark.works_with("torch.jit.trace, torch.export, torch.fx")
def test_a_graph_module_calls_the_same_layers_and_is_penalized(x):
    model = make(Sequenced)
    attachment = regkit.attach(model, AR_TAR)
    graph = torch.fx.symbolic_trace(model)
    assert stored(attachment) == 0
    graph(x)
    torch.testing.assert_close(attachment.penalty(), ar_tar(model.outputs(x)))


class TwoSteps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = Leaky(3, 4)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.rnn(x, self.rnn(x, h))


@pytest.mark.works_with("torch.jit.trace, torch.export, torch.fx")
def test_a_cell_that_is_traced_through_leaves_nothing_behind_and_its_training_is_an_error(x):
    model = make(TwoSteps)
    attachment = regkit.attach(model, AR_TAR)
    graph = torch.fx.symbolic_trace(model)
    assert stored(attachment) == 0
    optimizer = torch.optim.SGD(graph.parameters(), lr=0.1)
    (graph(x[0], torch.zeros(6, 4).double()).sum() + attachment.penalty()).backward()
    with pytest.raises(regkit.StepError, match=UNRECORDED):
        optimizer.step()


@KINDS
@pytest.mark.works_with("torch.jit.trace, torch.export, torch.fx")
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_leaves_nothing_in_the_store(mode, kind, x):
    model = make(kind)
    attachment = regkit.attach(model, AR_TAR)
    make_fx(lambda x: model(x), tracing_mode=mode, _allow_non_fake_inputs=True)(x)
    assert is_unharmed(attachment, model, x)


@KINDS
@pytest.mark.works_with("Fake tensors")
def test_a_run_on_fake_tensors_leaves_none_in_the_store(kind, x):
    model = make(kind)
    attachment = regkit.attach(model, AR_TAR)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert type(model(mode.from_tensor(x))).__name__ == "FakeTensor"
    assert is_unharmed(attachment, model, x)


def test_nothing_that_was_refused_is_kept_alive(x):
    model = make(Looped)
    regkit.attach(model, AR_TAR)
    outputs: list[weakref.ref[Tensor]] = []
    model.rnn.register_forward_hook(lambda module, args, h: outputs.append(weakref.ref(h)), prepend=True)
    with pytest.raises(regkit.StepError, match=TRANSFORMED):
        transformed(model, x)["grad"]()
    gc.collect()
    assert outputs
    assert all(output() is None for output in outputs)
