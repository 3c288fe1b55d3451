"""Traps around attaching: the same weight twice, modules that move, plugins that lie, threads."""

from __future__ import annotations

import gc
import threading
import time

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import regkit

AR = {"rules": [{"name": "ar", "penalty": "activity_l2(1)"}]}
L2 = {"rules": [{"name": "l2", "penalty": "l2(0.1)"}]}


def zero(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = torch.zeros_like(p)


def test_the_same_rules_on_a_model_and_on_its_part_are_refused():
    model = nn.ModuleDict({"rnn": nn.LSTM(3, 4)})
    regkit.attach(model, L2)
    with pytest.raises(regkit.AttachError, match=r"acts on weight_ih_l0, where rule 'l2' of another attachment"):
        regkit.attach(model["rnn"], {"rules": [{"name": "other", "penalty": "l2(0.2)"}]})
    regkit.attach(model["rnn"], {"rules": [{"penalty": "l1(0.2)"}]})


@pytest.mark.parametrize("held", [False, True])
def test_a_module_replaced_after_attach_is_an_error_at_the_models_next_step(held):
    model = nn.ModuleDict({"a": nn.LSTM(3, 4), "b": nn.Linear(4, 1)})
    regkit.attach(model, L2)
    old = model["a"] if held else None
    model["a"] = nn.LSTM(3, 4)
    gc.collect()
    SGD(nn.Linear(2, 2).parameters(), lr=0.1).step()  # no concern of others
    model["b"](model["a"](torch.randn(2, 2, 3))[0]).sum().backward()
    with pytest.raises(regkit.AttachError, match="the module 'a' was replaced or removed after attach"):
        SGD(model.parameters(), lr=0.1).step()
    assert held == (old is not None)


def test_a_model_that_has_come_apart_does_not_keep_others_from_being_attached():
    broken = nn.ModuleDict({"a": nn.LSTM(3, 4)})
    regkit.attach(broken, L2)
    del broken["a"]
    gc.collect()
    assert regkit.attach(nn.LSTM(3, 4), L2).step_count == 0


def test_a_restriction_to_an_optimizer_that_is_gone_is_an_error():
    model = nn.LSTM(3, 4)
    regkit.attach(model, L2, optimizer=SGD(model.parameters(), lr=0.1))
    gc.collect()
    zero(model)
    with pytest.raises(regkit.StepError, match="restricted to is gone"):
        SGD(model.parameters(), lr=0.1).step()


def test_attaching_in_one_thread_does_not_break_steps_in_another():
    optimizer = SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    failed: list[Exception] = []
    done = threading.Event()

    def step() -> None:
        while not done.is_set():
            try:
                optimizer.step()
            except Exception as error:
                failed.append(error)
                return
            time.sleep(1e-5)  # else two busy threads keep the interpreter from the third

    keep = nn.LSTM(2, 2)
    regkit.attach(keep, L2)
    threads = [threading.Thread(target=step) for _ in range(2)]
    for thread in threads:
        thread.start()
    model = nn.LSTM(2, 2)
    for _ in range(200):
        with regkit.attach(model, L2):
            pass
    done.set()
    for thread in threads:
        thread.join()
    assert not failed


def test_values_of_a_model_that_is_gone_say_so():
    model = nn.LSTM(3, 4)
    attachment = regkit.attach(model, AR)
    model(torch.randn(2, 2, 3))
    del model
    gc.collect()
    assert attachment.values()["ar"].isnan()


class Broken(regkit.Penalty):
    """A penalty whose gradient has the wrong shape."""

    kind: str = "broken"

    def value(self, w: Tensor) -> Tensor:
        return w.sum()

    def gradient(self, w: Tensor) -> Tensor:
        return w.sum()


def test_a_gradient_of_the_wrong_shape_is_refused_before_anything_is_attached():
    model = nn.LSTM(3, 4)
    spec = regkit.Spec(rules=[regkit.Rule(penalty=Broken.model_construct(kind="broken", strength=1.0))])
    with pytest.raises(regkit.PluginError, match=r"gradient of .*Broken returns torch.float32 \(\), not"):
        regkit.attach(model, spec)
    with regkit.attach(model, L2):
        pass


def test_a_constraint_without_a_role_leaves_biases_alone():
    model = nn.LSTM(3, 4)
    plan = regkit.resolve(model, {"rules": [{"constraint": "unit_norm"}]})
    assert {site.role for site in plan.bindings[0].weights} == {"kernel", "recurrent"}


@pytest.mark.parametrize("schedule", ["linear(0, 1, 10)", "linear(1, 0, 10)", "exponential(1, 0.5, 10)"])
def test_a_schedule_that_would_shrink_every_weight_to_nothing_is_refused(schedule):
    with pytest.raises(regkit.SpecError, match="takes the bound to 0, which would make every weight 0"):
        regkit.load({"rules": [{"constraint": "max_norm(3)", "schedule": schedule}]})
