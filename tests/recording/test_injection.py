"""Activity penalties via inject: the gradient of `penalty()` in the loss, in loops that nobody edits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import regkit

pytestmark = pytest.mark.works_with("Loops that nobody can edit")

KINDS = [
    {"kind": "activity_l2", "strength": 0.7},
    {"kind": "temporal", "strength": 0.4},
    {"kind": "norm_stabilizer", "strength": 0.3, "reduction": "batch"},
]


def document(
    via: str, *, role: str = "output", kinds: list[dict[str, Any]] = KINDS, single: bool = False
) -> dict[str, Any]:
    rules = [{"target": {"role": role}, "penalty": kind, "via": via} for kind in kinds]
    return {"rules": [{**rule, "optional": True} if single else rule for rule in rules]}


Loop = Callable[[nn.Module, Tensor], Tensor]


def whole_sequence(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)[0].square().sum()


def last_state_alone(model: nn.Module, x: Tensor) -> Tensor:
    """The sequence is thrown away: only h_n and c_n are in the loss."""
    state = model(x)[1]
    return (state[0] * state[1]).sum() if isinstance(state, tuple) else state.sum()


def packed(model: nn.Module, x: Tensor) -> Tensor:
    return model(pack_padded_sequence(x, [5, 3, 3, 1]))[0].data.sum()


def several_calls(model: nn.Module, x: Tensor) -> Tensor:
    """As a policy that is called once for each stretch between two episodes, with the state handed on."""
    first, state = model(x[:3])
    second, _ = model(x[3:], state)
    return first.sum() + second.square().sum()


def checkpointed(model: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(lambda x: model(x)[0], x, use_reentrant=False).sum()


def gradients(
    model: nn.Module, loop: Loop, x: Tensor, via: str | None, role: str = "output", single: bool = False
) -> list[Tensor]:
    model = copy.deepcopy(model)
    if via is None:
        loop(model, x).backward()
    else:
        scale = {"loss_scale": 1.0} if via == "inject" else {}
        kinds = KINDS if role == "output" else KINDS[:1]
        attachment = regkit.attach(model, document(via, role=role, kinds=kinds, single=single), **scale)
        (loop(model, x) + attachment.penalty()).backward()
        attachment.detach()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("layer", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize("loop", [whole_sequence, last_state_alone, packed, several_calls, checkpointed])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=["plain", "stacked"])
def test_the_gradient_is_that_of_the_penalty_in_the_loss(layer, loop, options):
    model = layer(3, 4, **options).double()
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    plain, in_loss, injected = (gradients(model, loop, x, via) for via in (None, "loss", "inject"))
    assert not torch.allclose(plain[0], in_loss[0])
    for one, other in zip(in_loss, injected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("role", ["state", "cell"])
def test_states_carry_it_too(role):
    model = nn.LSTM(3, 4).double()
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    for one, other in zip(
        gradients(model, whole_sequence, x, "loss", role),
        gradients(model, whole_sequence, x, "inject", role),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cell", [nn.RNNCell, nn.LSTMCell, nn.GRUCell])
def test_a_loop_over_a_cell_carries_it_through_the_states_that_are_handed_on(cell):
    model = cell(3, 4).double()
    x = torch.randn(5, 4, 3, dtype=torch.float64)

    def loop(model: nn.Module, x: Tensor) -> Tensor:
        state = None
        for step in x:
            state = model(step, state)
        return (state[0] if isinstance(state, tuple) else state).square().sum()

    for one, other in zip(gradients(model, loop, x, "loss"), gradients(model, loop, x, "inject"), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def train(via: str, scale: Any, steps: Callable[[nn.Module, torch.optim.Optimizer, Any], None]) -> nn.Module:
    torch.manual_seed(3)
    model = nn.GRU(3, 4).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with regkit.attach(model, document(via), **({"loss_scale": scale} if via == "inject" else {})) as attachment:
        steps(model, optimizer, attachment.penalty if via == "loss" else (lambda: 0.0))
    return model


def assert_same_training(scale: Any, steps: Any) -> None:
    for one, other in zip(
        train("loss", None, steps).parameters(), train("inject", scale, steps).parameters(), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def data(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(5, 4, 3, generator=generator, dtype=torch.float64) for _ in range(count)]


def test_accumulation_is_told_by_the_scale():
    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, penalty: Any) -> None:
        for start in range(0, 8, 4):
            optimizer.zero_grad()
            for x in data(8)[start : start + 4]:
                ((whole_sequence(model, x) + penalty()) / 4).backward()
            optimizer.step()

    assert_same_training(1 / 4, steps)


def test_a_gradient_scaler_is_asked_each_time():
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, penalty: Any) -> None:
        scaler.load_state_dict(torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2).state_dict())
        for x in data(5):
            optimizer.zero_grad()
            scaler.scale(whole_sequence(model, x) + penalty()).backward()
            scaler.step(optimizer)
            scaler.update()

    assert_same_training(scaler.get_scale, steps)


def test_a_recurrent_policy_that_is_called_several_times_a_step_is_regularized_once():
    """The loop of stable-baselines' recurrent PPO: rollouts without gradients, then one call per step of time."""

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, penalty: Any) -> None:
        for x in data(3):
            with torch.no_grad():
                state = None
                for observation in x:
                    _, state = model(observation.unsqueeze(0), state)
            for _ in range(2):  # epochs over the rollout
                state, outputs = torch.zeros(1, 4, 4, dtype=torch.float64), []
                for time, observation in enumerate(x):
                    starts = torch.tensor([time == 2, False, False, time == 4]).double()
                    out, state = model(observation.unsqueeze(0), (1 - starts).view(1, -1, 1) * state)
                    outputs.append(out)
                optimizer.zero_grad()
                (torch.cat(outputs).square().mean() + penalty()).backward()
                optimizer.step()

    assert_same_training(1.0, steps)


def test_what_was_injected_is_seen_in_values_and_counts_steps_of_a_schedule():
    model = nn.LSTM(3, 4)
    spec = {"rules": [{"name": "ar", "penalty": "activity_l2(2)", "via": "inject",
                       "schedule": {"kind": "linear", "start": 1, "end": 3, "steps": 2}}]}  # fmt: skip
    attachment = regkit.attach(model, spec, loss_scale=64.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for factor in (1, 2, 3):
        y = model(torch.ones(5, 4, 3))[0]
        y.sum().backward()
        torch.testing.assert_close(attachment.values()["ar"], 2.0 * factor * y.detach().square().mean())
        optimizer.step()
    assert attachment.penalty() == 0


def test_an_output_that_no_backward_pass_reaches_is_an_error():
    model = nn.LSTM(3, 4)
    attachment = regkit.attach(model, document("inject"), loss_scale=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(5, 4, 3))
    whole_sequence(model, torch.ones(5, 4, 3)).backward()
    with pytest.raises(regkit.StepError, match="no backward pass reached"):
        optimizer.step()
    attachment.discard()
    optimizer.zero_grad()
    whole_sequence(model, torch.ones(5, 4, 3)).backward()
    optimizer.step()


def test_a_step_without_a_recorded_pass_is_an_error():
    model = nn.LSTM(3, 4)
    regkit.attach(model, document("inject"), loss_scale=1.0)
    model.forward(torch.ones(5, 4, 3))[0].sum().backward()
    with pytest.raises(regkit.StepError, match="recorded nothing"):
        torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_a_graph_that_is_walked_twice_carries_it_once():
    model = nn.GRU(3, 4).double()
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    plain, once = gradients(model, whole_sequence, x, None), gradients(model, whole_sequence, x, "inject")
    regkit.attach(model, document("inject"), loss_scale=1.0)
    loss = whole_sequence(model, x)
    loss.backward(retain_graph=True)
    loss.backward()
    for twice, bare, with_penalty in zip(model.parameters(), plain, once, strict=True):
        torch.testing.assert_close(twice.grad, bare + with_penalty)


def test_a_gradient_that_is_only_looked_at_carries_nothing_away():
    """As for a saliency map or a gradient penalty, before the backward pass of training."""
    model = nn.GRU(3, 4).double()
    x = torch.randn(5, 4, 3, dtype=torch.float64, requires_grad=True)
    expected = gradients(model, whole_sequence, x, "inject")
    (bare,) = torch.autograd.grad(whole_sequence(model, x), x)
    regkit.attach(model, document("inject"), loss_scale=1.0)
    loss = whole_sequence(model, x)
    (looked_at,) = torch.autograd.grad(loss, x, retain_graph=True)
    torch.testing.assert_close(looked_at, bare)
    loss.backward()
    for one, parameter in zip(expected, model.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=0, atol=1e-12)


def test_gradients_that_are_asked_for_by_hand_carry_it_and_are_refused_where_they_may_be_a_probe():
    model = nn.GRU(3, 4).double()
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    expected = gradients(model, whole_sequence, x, "inject")
    regkit.attach(model, document("inject"), loss_scale=1.0)
    loss = whole_sequence(model, x)
    with pytest.raises(regkit.StepError, match="whether they are trained with cannot be told"):
        torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    by_hand = torch.autograd.grad(loss, list(model.parameters()))
    for one, other in zip(expected, by_hand, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_rules_via_loss_and_via_inject_live_on_one_module():
    model = nn.LSTM(3, 4).double()
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    expected = gradients(model, whole_sequence, x, "loss")
    both = {"rules": [*document("loss", kinds=KINDS[:1])["rules"], *document("inject", kinds=KINDS[1:])["rules"]]}
    attachment = regkit.attach(model, both, loss_scale=1.0)
    (whole_sequence(model, x) + attachment.penalty()).backward()
    for one, parameter in zip(expected, model.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("via", "scale"), [("inject", None), ("loss", 1.0)])
def test_the_scale_goes_with_inject_and_is_never_guessed(via, scale):
    model = nn.LSTM(3, 4)
    with pytest.raises(regkit.AttachError, match="loss_scale="):
        regkit.attach(model, document(via), loss_scale=scale)
    assert not model._forward_hooks


def test_an_output_that_is_changed_in_place_is_refused():
    model = nn.LSTM(3, 4)
    regkit.attach(model, document("inject"), loss_scale=1.0)
    with pytest.raises(RuntimeError, match="view and is being modified inplace"):
        model(torch.ones(5, 4, 3))[0].relu_()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # of the compiler
@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRUCell])
def test_a_compiled_model_carries_it_through_a_gap(layer):
    torch.compiler.reset()
    model = nn.Sequential(layer(3, 4)).double()
    x = torch.randn(5, 3, dtype=torch.float64)

    def compiled(model: nn.Module, x: Tensor) -> Tensor:
        result = torch.compile(model, backend="aot_eager")(x)
        return (result[0] if isinstance(result, tuple) else result).sum()

    ways = (None, "loss", "inject")
    plain, in_loss, injected = (gradients(model, compiled, x, via, single=layer is nn.GRUCell) for via in ways)
    assert not torch.allclose(plain[0], in_loss[0])
    for one, other in zip(in_loss, injected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(nn.GRU(3, 4))], ids=["nothing", "something"])
def test_one_document_with_an_optional_rule_serves_models_with_and_without_a_place_for_it(model):
    rule = {"target": {"module": "**"}, "penalty": "activity_l2(1)", "via": "inject", "optional": True}
    attachment = regkit.attach(model, {"rules": [rule]}, loss_scale=2.0)
    assert bool(attachment.plan.bindings[0].outputs) == isinstance(model, nn.Sequential)


def test_a_loss_scale_for_a_document_without_such_a_rule_is_an_error():
    with pytest.raises(regkit.AttachError, match="loss_scale= goes with rules via"):
        regkit.attach(nn.GRU(3, 4), {"rules": [{"penalty": "l2(1)"}]}, loss_scale=2.0)
