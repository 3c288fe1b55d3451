"""An attachment's life: attach, read, save, resume, copy, detach; what it leaves on the model, and what it does not."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

import regkit

SPEC = {
    "rules": [
        {"name": "decay", "target": {"role": "recurrent"}, "penalty": {"kind": "l2", "strength": 0.1},
         "schedule": {"kind": "linear", "start": 0.0, "end": 1.0, "steps": 4}},
        {"target": {"role": "kernel"}, "constraint": "max_norm(0.4)", "every": 2},
        {"name": "ar", "penalty": {"kind": "activity_l2", "strength": 2.0}},
        {"target": {"role": "bias"}, "penalty": "l1(0.3)", "via": "loss"},
    ]
}  # fmt: skip
Batches = list[tuple[Tensor, Tensor]]


def train(model: nn.Module, attachment: regkit.Attachment, optimizer: torch.optim.Optimizer, batches: Batches) -> None:
    for x, y in batches:
        loss = nn.functional.mse_loss(model(x), y) + attachment.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def global_hooks() -> int:
    return len(torch_optimizer._global_optimizer_pre_hooks) + len(torch_optimizer._global_optimizer_post_hooks)


def test_the_model_keeps_its_class_its_keys_and_its_parameters(make_model):
    model = make_model()
    before = (type(model), type(model.rnn), list(model.state_dict()), [id(p) for p in model.parameters()])
    modules = [name for name, _ in model.named_modules()]
    regkit.attach(model, SPEC)
    assert (type(model), type(model.rnn), list(model.state_dict()), [id(p) for p in model.parameters()]) == before
    assert [name for name, _ in model.named_modules()] == modules


def test_values_are_strength_times_factor_times_penalty(make_model, batches):
    model = make_model()
    attachment = regkit.attach(model, SPEC)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert list(attachment.values()) == ["decay", "ar", "rules/3"]
    assert attachment.values()["ar"].isnan()
    for step in range(4):
        h, _ = model.rnn(batches[step][0])
        values = attachment.values()
        torch.testing.assert_close(values["decay"], 0.1 * step / 4 * model.rnn.weight_hh_l0.detach().square().sum())
        torch.testing.assert_close(values["ar"], 2.0 * h.detach().square().mean())
        biases = model.rnn.bias_ih_l0.detach().abs().sum() + model.rnn.bias_hh_l0.detach().abs().sum()
        torch.testing.assert_close(values["rules/3"], 0.3 * biases)
        assert not any(value.requires_grad for value in values.values())
        torch.testing.assert_close(attachment.penalty().detach(), values["ar"] + values["rules/3"])
        attachment.discard()  # what penalty() returned is in no loss
        train(model, attachment, optimizer, [batches[step]])
        assert attachment.step_count == step + 1
        torch.testing.assert_close(attachment.values()["ar"], values["ar"])  # what was optimized in the step


def test_violations_tell_how_far_the_worst_weight_is_outside(make_model):
    model = make_model()
    attachment = regkit.attach(model, SPEC)
    worst = model.rnn.weight_ih_l0.norm(dim=1).max().detach() - 0.4
    assert worst > 0
    torch.testing.assert_close(attachment.violations(), {"rules/1": worst})
    attachment.apply_constraints()
    assert attachment.violations()["rules/1"] < 1e-12


def test_a_penalty_of_nothing_is_a_zero_that_can_be_added(make_model, batches):
    model = make_model()
    attachment = regkit.attach(model, {"rules": [{"penalty": "l2(0.1)"}]})
    penalty = attachment.penalty()
    assert penalty.shape == ()
    assert penalty == 0
    (model(batches[0][0]).sum() + penalty).backward()


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(make_model, batches, tmp_path):
    def run(model: nn.Module, part: Batches, checkpoint: Path | None) -> dict[str, object]:
        attachment = regkit.attach(model, SPEC)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        if checkpoint is not None:
            saved = torch.load(checkpoint)
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            attachment.load_state_dict(saved["regkit"])
        train(model, attachment, optimizer, part)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "regkit": attachment.state_dict()}
        return copy.deepcopy(state)

    whole = run(make_model(), batches, None)
    torch.save(run(make_model(), batches[:3], None), tmp_path / "checkpoint.pt")
    resumed = run(make_model(), batches[3:], tmp_path / "checkpoint.pt")
    assert resumed["regkit"] == whole["regkit"]
    assert whole["regkit"]["step_count"] == 4
    assert set(whole["regkit"]["stepped"]) == {name for name, _ in make_model().named_parameters()}
    for name, weight in whole["model"].items():
        assert torch.equal(weight, resumed["model"][name]), name


STATE = {"version": 2, "step_count": 2, "stepped": [], "due": {}}


@pytest.mark.parametrize(
    "state", [{}, {"step_count": 3}, STATE | {"step_count": -1}, STATE | {"step_count": True},
              STATE | {"step_count": 2.0}, STATE | {"version": 3}, STATE | {"stepped": 1}, STATE | {"due": []},
              STATE | {"stepped": ["rnn.weight_hh_l7"]}, STATE | {"due": {"ball": ["rnn.weight_hh_l7"]}},
              STATE | {"more": 0}],
)  # fmt: skip
def test_a_state_that_is_none_is_refused(state, make_model):
    attachment = regkit.attach(make_model(), SPEC)
    with pytest.raises(ValueError, match="state"):
        attachment.load_state_dict(state)
    assert attachment.step_count == 0


def test_detach_leaves_no_hook_and_no_trace(make_model, batches):
    model = make_model()
    before = global_hooks()
    attributes = [set(vars(module)) for module in model.modules()]
    attachment = regkit.attach(model, SPEC)
    assert hooks_of(model) == 1
    assert global_hooks() == before + 2
    train(model, attachment, torch.optim.SGD(model.parameters(), lr=0.1), batches)
    attachment.detach()
    attachment.detach()
    assert hooks_of(model) == 0
    assert global_hooks() == before
    assert [set(vars(module)) for module in model.modules()] == attributes
    with pytest.raises(regkit.RegkitError, match="detached"):
        attachment.penalty()
    assert "detached" in repr(attachment)
    attachment.values()
    with regkit.attach(model, SPEC):  # not attached twice: the first one is gone
        assert hooks_of(model) == 1
    assert hooks_of(model) == 0


def test_attaching_the_same_spec_twice_is_an_error_and_another_spec_is_not(make_model, batches):
    model = make_model()
    regkit.attach(model, SPEC)
    with pytest.raises(regkit.AttachError, match="acts already: it would count twice"):
        regkit.attach(model, SPEC)
    regkit.attach(model, {"rules": [{"target": {"role": "bias"}, "penalty": "l2(0.1)"}]})
    regkit.attach(make_model(), SPEC)
    assert hooks_of(model) == 1


def test_two_attachments_both_act(make_model, batches):
    model = make_model()
    recurrent = {"role": "recurrent"}
    regkit.attach(model, {"rules": [{"target": recurrent, "penalty": "l2(0.5)"}]})
    regkit.attach(model, {"rules": [{"target": recurrent, "penalty": "l1(0.25)"}]})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model(batches[0][0]).sum().backward()
    before = model.rnn.weight_hh_l0.grad.clone()
    optimizer.step()
    weight = model.rnn.weight_hh_l0.detach()
    torch.testing.assert_close(model.rnn.weight_hh_l0.grad, before + weight + 0.25 * weight.sign())


@pytest.mark.parametrize("bad", [{"rules": [{"target": {"module": "rmm"}, "penalty": "l2(1)"}, SPEC["rules"][2]]}, "{"])
def test_a_failed_attach_leaves_the_model_untouched(bad, make_model):
    model = make_model()
    before = global_hooks()
    with pytest.raises(regkit.RegkitError):
        regkit.attach(model, bad)
    assert (hooks_of(model), global_hooks()) == (0, before)


def test_an_attach_that_fails_half_way_takes_its_hooks_back(make_model, monkeypatch):
    model = nn.ModuleList([make_model(), make_model()])
    before = global_hooks()

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no hooks here")

    monkeypatch.setattr(model[1].rnn, "register_forward_hook", refuse)
    with pytest.raises(RuntimeError, match="no hooks here"):
        regkit.attach(model, SPEC)
    assert (hooks_of(model), global_hooks()) == (0, before)
    monkeypatch.undo()
    regkit.attach(model, SPEC)


def test_a_plan_may_be_attached_to_the_model_it_was_made_for(make_model):
    model = make_model()
    plan = regkit.resolve(model, SPEC)
    assert hooks_of(model) == 0
    attachment = regkit.attach(model, plan)
    assert attachment.plan is plan
    regkit.attach(make_model(), plan)  # an equal model will do
    with pytest.raises(regkit.AttachError, match=r"rnn.*GRU here, LSTM in the plan"):
        regkit.attach(make_model(nn.GRU), plan)
    smaller = make_model()
    smaller.rnn = nn.LSTM(3, 2)
    with pytest.raises(regkit.AttachError, match=r"weight_hh_l0 is \(8, 2\) here, \(16, 4\) in the plan"):
        regkit.attach(smaller, plan)


def test_an_attachment_that_nobody_holds_stays_in_force_and_goes_with_the_model(make_model, batches):
    model = make_model()
    before = global_hooks()
    regkit.attach(model, {"rules": [{"constraint": "max_norm(0.01)"}]})
    gc.collect()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(batches[0][0]).sum().backward()
    optimizer.step()
    assert model.rnn.weight_hh_l0.norm(dim=1).max() < 0.011

    gone = weakref.ref(model)
    del model
    optimizer.zero_grad()
    gc.collect()
    assert gone() is None
    optimizer.step()
    with regkit.attach(make_model(), SPEC):  # the hooks of a model that is gone leave when the next one comes
        assert global_hooks() == before + 2
    assert global_hooks() == before


def test_a_model_that_dies_in_the_middle_of_a_step_does_not_break_the_loop_over_hooks(make_model, batches):
    dying, model = [make_model()], make_model()
    regkit.attach(dying[0], {"rules": [{"penalty": "l2(1)"}]})

    def kill(*_: object) -> None:
        dying.clear()
        gc.collect()

    killer = torch_optimizer.register_optimizer_step_pre_hook(kill)
    attachment = regkit.attach(model, {"rules": [{"penalty": "l2(1)"}]})
    try:
        model(batches[0][0]).sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    finally:
        killer.remove()
    assert attachment.step_count == 1


def test_an_optimizer_that_owns_none_of_a_rules_weights_is_refused(make_model):
    model = make_model()
    before = global_hooks()
    head = torch.optim.SGD(model.head.parameters(), lr=0.1)
    with pytest.raises(regkit.AttachError, match=r"rule 'decay' acts on no weight that optimizer= \(SGD\) owns"):
        regkit.attach(model, SPEC, optimizer=head)
    with pytest.raises(TypeError, match="optimizer= takes torch optimizers, got Linear"):
        regkit.attach(model, SPEC, optimizer=[model.head])
    assert (hooks_of(model), global_hooks()) == (0, before)
    regkit.attach(model, SPEC, optimizer=[head, torch.optim.SGD(model.rnn.parameters(), lr=0.1)])


@pytest.mark.parametrize("model", [None, [nn.LSTM(2, 2)], nn.LSTM])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(TypeError, match=r"a model is an nn\.Module"):
        regkit.attach(model, SPEC)


@pytest.mark.slow
def test_a_thousand_attachments_leave_nothing(make_model, batches):
    model = make_model()
    before = (hooks_of(model), global_hooks())
    for _ in range(1000):
        with regkit.attach(model, regkit.resolve(model, SPEC)):
            pass
    model(batches[0][0])
    assert (hooks_of(model), global_hooks()) == before
    assert not any(info.weakref() is model for info in weakref.finalize._registry.values())


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_hooked_model_records_nothing_into_the_original(how, make_model, batches):
    model = make_model()
    attachment = regkit.attach(model, SPEC)
    x = batches[0][0]
    original = model(x)
    copied = how(make_copyable(model))
    torch.testing.assert_close(copied(x), original)
    copied(x).sum().backward()
    torch.testing.assert_close(attachment.values()["ar"], 2.0 * model.rnn(x)[0].detach().square().mean())


def make_copyable(model: nn.Module) -> nn.Module:
    """A model in the middle of a step: its gradients and its recorded activity are there when it is copied."""
    model.zero_grad()
    return model


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickle.dumps])
def test_an_attachment_itself_cannot_be_copied(how, make_model):
    attachment = regkit.attach(make_model(), SPEC)
    with pytest.raises(regkit.RegkitError, match="its model can"):
        how(attachment)


def test_the_step_formats_validates_and_looks_up_nothing(make_model, batches, monkeypatch):
    model = make_model()
    attachment = regkit.attach(model, SPEC)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, attachment, optimizer, batches[:1])

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("on the hot path")

    for name in ("find", "kind", "entries", "adapter"):
        monkeypatch.setattr(regkit.Registry, name, refuse)
    monkeypatch.setattr(nn.Module, "named_parameters", refuse)
    monkeypatch.setattr(regkit.Penalty, "describe", refuse)
    monkeypatch.setattr(regkit.ActivityPenalty, "describe", refuse)
    monkeypatch.setattr(Tensor, "item", refuse)
    train(model, attachment, optimizer, batches[1:])
