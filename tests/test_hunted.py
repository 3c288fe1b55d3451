"""What an adversary once found: each of these was silently wrong, a false alarm, or a leak."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

import regkit

AR = {"rules": [{"name": "ar", "penalty": "activity_l2(1)"}]}
TAR = {"rules": [{"name": "tar", "penalty": "temporal(1)"}]}
L2 = {"rules": [{"name": "l2", "penalty": "l2(0.1)"}]}


def zero(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = torch.zeros_like(p)


@pytest.mark.parametrize("with_closure", [False, True])
def test_a_step_keeps_nothing_of_its_caller_alive(with_closure):
    model = nn.LSTM(3, 3)
    optimizer = SGD(model.parameters(), lr=0.01)
    regkit.attach(model, L2)
    alive: list[weakref.ref[Tensor]] = []

    def step() -> None:
        batch = torch.ones(10)
        alive.append(weakref.ref(batch))

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = model(torch.randn(2, 1, 3))[0].sum()
            loss.backward()
            return loss

        if with_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()

    gc.disable()
    try:
        for _ in range(5):
            step()
        assert not any(reference() is not None for reference in alive)
    finally:
        gc.enable()


def test_a_model_collected_in_the_middle_of_another_optimizers_step_is_no_error():
    armed: list[bool] = []

    class Collecting(SGD):
        @property
        def param_groups(self) -> list:
            if armed:
                gc.collect()
            return self.__dict__["groups"]

        @param_groups.setter
        def param_groups(self, groups: list) -> None:
            self.__dict__["groups"] = groups

    optimizer = Collecting(nn.Linear(2, 2).parameters(), lr=0.1)
    model = nn.LSTM(3, 4)
    regkit.attach(model, L2)
    model.itself = [model]
    gc.disable()
    try:
        del model
        armed.append(True)
        optimizer.step()
    finally:
        gc.enable()


class After(SGD):
    """An optimizer that goes on after the step of its base class, which fires the hooks too."""

    def step(self, closure: object = None) -> None:
        super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(100)


class Twice(SGD):
    def step(self, closure: object = None) -> None:
        super().step()
        super().step()


def test_a_step_within_a_step_of_the_same_optimizer_does_not_end_it():
    SGD([torch.zeros(1, requires_grad=True)])  # torch hooks a class when one of it is first made
    model = nn.LSTM(3, 4)
    with regkit.attach(model, {"rules": [{"name": "c", "constraint": "max_norm(1)"}]}) as attachment:
        optimizer = After(model.parameters(), lr=0.1)
        model(torch.randn(2, 2, 3))[0].sum().backward()
        optimizer.step()
        assert attachment.violations()["c"] < 1e-6
    attachment = regkit.attach(model, L2)
    zero(model)
    Twice(model.parameters(), lr=0.0).step()
    torch.testing.assert_close(model.weight_ih_l0.grad, 0.2 * model.weight_ih_l0.detach())
    assert attachment.step_count == 1


def two_optimizers(model: nn.LSTM) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    parts = [[p for p in model.parameters() if p.dim() == rank] for rank in (2, 1)]
    return SGD(parts[0], lr=0.1), Adam(parts[1])


def test_two_optimizers_of_one_module_answer_to_one_penalty():
    model = nn.LSTM(3, 4)
    attachment = regkit.attach(model, AR)
    matrices, biases = two_optimizers(model)
    for _ in range(3):
        (model(torch.randn(2, 2, 3))[0].sum() + attachment.penalty()).backward()
        matrices.step()
        biases.step()
        model.zero_grad()
    assert attachment.step_count == 3
    model(torch.randn(2, 2, 3))[0].sum().backward()
    with pytest.raises(regkit.StepError, match="not consumed"):
        matrices.step()


def test_a_rule_via_the_loss_over_two_optimizers():
    model = nn.ModuleDict({"a": nn.LSTM(3, 4), "b": nn.LSTM(4, 4)})
    attachment = regkit.attach(model, {"rules": [{"penalty": "l2(0.1)", "via": "loss"}]})
    optimizers = [Adam(model["a"].parameters()), Adam(model["b"].parameters())]
    for _ in range(2):
        (model["b"](model["a"](torch.randn(2, 2, 3))[0])[0].sum() + attachment.penalty()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    model["b"](model["a"](torch.randn(2, 2, 3))[0])[0].sum().backward()
    with pytest.raises(regkit.StepError, match="not part of the loss"):
        optimizers[0].step()


def test_a_frozen_module_between_two_optimizers():
    model = nn.ModuleList([nn.Linear(3, 3), nn.LSTM(3, 4).requires_grad_(False), nn.Linear(4, 1)])
    attachment = regkit.attach(model, AR)
    optimizers = [Adam(model[0].parameters()), Adam(model[2].parameters())]
    for _ in range(2):
        (model[2](model[1](model[0](torch.randn(2, 2, 3)))[0]).sum() + attachment.penalty()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_an_optimizer_step_in_the_backward_pass():
    model = nn.LSTM(3, 4)
    attachment = regkit.attach(model, AR)
    optimizers = {p: SGD([p], lr=0.1) for p in model.parameters()}

    def step(p: Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    for _ in range(3):
        (model(torch.randn(2, 2, 3))[0].sum() + attachment.penalty()).backward()
    assert attachment.step_count == 3


def test_activity_that_no_step_ever_consumes_is_an_error_and_does_not_grow():
    model = nn.ModuleList([nn.LSTM(3, 4), nn.Linear(4, 1)])
    regkit.attach(model, AR)
    optimizer = Adam(model[1].parameters())  # the LSTM is left out
    model[1](model[0](torch.randn(2, 2, 3))[0]).sum().backward()
    optimizer.step()
    model[1](model[0](torch.randn(2, 2, 3))[0]).sum().backward()
    with pytest.raises(regkit.StepError, match="never consumed"):
        optimizer.step()


def test_a_generators_outputs_may_wait_while_its_critic_is_trained():
    model = nn.ModuleDict({"generator": nn.GRU(2, 3), "critic": nn.Linear(3, 1)})
    attachment = regkit.attach(model, AR)
    critic, generator = SGD(model["critic"].parameters(), lr=0.1), SGD(model["generator"].parameters(), lr=0.1)
    for _ in range(3):
        made, _ = model["generator"](torch.randn(4, 1, 2))
        critic.zero_grad()
        model["critic"](made.detach()).sum().backward()
        critic.step()
        generator.zero_grad()
        (model["critic"](made).sum() + attachment.penalty()).backward()
        generator.step()


def test_lengths_around_a_loop_hold_over_chunks_of_it():
    cell = nn.GRUCell(3, 4)
    attachment = regkit.attach(cell, AR)
    x, lengths, h = torch.randn(6, 2, 3), torch.tensor([6, 3]), None
    with attachment.lengths(lengths):
        for start in (0, 3):
            outputs = []
            for time in range(start, start + 3):
                h = cell(x[time], h)
                outputs.append(h)
            valid = (torch.arange(start, start + 3)[:, None] < lengths)[..., None]
            wanted = (torch.stack(outputs).square() * valid).sum() / (valid.sum() * 4)
            torch.testing.assert_close(attachment.penalty(), wanted)
            h = h.detach()


def test_steps_that_are_not_recorded_count_in_time():
    cell = nn.GRUCell(3, 4)
    attachment = regkit.attach(cell, AR)
    x = torch.randn(4, 2, 3)
    with attachment.lengths([4, 3]):
        with torch.no_grad():
            h = cell(x[1], cell(x[0]))
        third = cell(x[2], h)
        fourth = cell(x[3], third)
    rows = torch.cat([third, fourth[:1]])
    torch.testing.assert_close(attachment.penalty(), rows.square().mean())


def test_lengths_around_each_call_of_a_cell_are_refused():
    cell = nn.GRUCell(3, 4)
    attachment = regkit.attach(cell, AR)
    with pytest.raises(regkit.StepError, match="around the whole loop"), attachment.lengths([4, 1]):
        cell(torch.randn(2, 3))


def test_a_mask_with_holes_counts_the_same_pairs_for_a_cell_and_a_layer():
    cell, layer = nn.RNNCell(3, 4), nn.RNN(3, 4)
    layer.load_state_dict({f"{name}_l0": value for name, value in cell.state_dict().items()})
    attachments = regkit.attach(cell, TAR), regkit.attach(layer, TAR)
    x, mask = torch.randn(4, 2, 3), torch.tensor([[0, 1], [1, 1], [1, 0], [1, 1]]).bool()
    h = None
    for time in range(4):
        with attachments[0].mask(mask[time]):
            h = cell(x[time], h)
    with attachments[1].mask(mask):
        layer(x)
    torch.testing.assert_close(attachments[0].penalty(), attachments[1].penalty())


def test_new_optimizers_for_the_same_weights_go_on_counting():
    model = nn.LSTM(3, 4)
    attachment = regkit.attach(model, {"rules": [{"name": "c", "constraint": "max_norm(0.01)", "every": 2}]})
    kept = []
    for step in range(6):
        kept.append(SGD(model.parameters(), lr=0.0))
        zero(model)
        kept[-1].step()
        assert attachment.step_count == step + 1
    assert attachment.violations()["c"] < 1e-6


def test_an_output_changed_in_place_before_it_is_penalized_is_an_error():
    model = nn.GRU(3, 4)
    attachment = regkit.attach(model, AR)
    h = model(torch.randn(5, 2, 3))[0]
    h.masked_fill_(torch.ones_like(h).bool(), 7.0)
    with pytest.raises(regkit.StepError, match="output of the model was changed in place"):
        attachment.penalty()


def test_lengths_and_masks_are_taken_as_they_were_given():
    model = nn.GRU(3, 4)
    attachment = regkit.attach(model, AR)
    lengths = torch.tensor([5, 1])
    with attachment.lengths(lengths):
        h, _ = model(torch.randn(5, 2, 3))
    lengths.fill_(5)
    rows = torch.cat([h[:, 0], h[:1, 1]])
    torch.testing.assert_close(attachment.penalty(), rows.square().mean())


def test_a_skipped_batch_is_discarded():
    model = nn.LSTM(3, 4)
    attachment = regkit.attach(model, AR)
    x = torch.randn(2, 2, 3)
    model(x * torch.nan)
    attachment.discard()
    h, _ = model(x)
    torch.testing.assert_close(attachment.penalty(), h.square().mean())


def test_every_penalty_must_be_in_a_loss_not_just_one():
    model = nn.LSTM(3, 4)
    attachment = regkit.attach(model, AR)
    optimizer = SGD(model.parameters(), lr=0.1)
    (model(torch.randn(2, 2, 3))[0].sum() + attachment.penalty()).backward()
    loss = model(torch.randn(2, 2, 3))[0].sum()
    attachment.penalty()
    loss.backward()
    with pytest.raises(regkit.StepError, match="was not part of a loss"):
        optimizer.step()


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
    with pytest.raises(regkit.AttachError, match="replaced or removed after attach"):
        SGD(model.parameters(), lr=0.1).step()
    assert held == (old is not None)


def test_a_restriction_to_an_optimizer_that_is_gone_is_an_error():
    model = nn.LSTM(3, 4)
    regkit.attach(model, L2, optimizer=SGD(model.parameters(), lr=0.1))
    gc.collect()
    zero(model)
    with pytest.raises(regkit.StepError, match="restricted to is gone"):
        SGD(model.parameters(), lr=0.1).step()


def test_two_biases_of_a_sum_with_different_learning_rates_have_no_prox():
    model = nn.LSTM(3, 4)
    rule = {"target": {"role": "bias", "bias": "effective"}, "penalty": "l1(1)", "via": "proximal"}
    regkit.attach(model, {"rules": [rule]})
    zero(model)
    groups = [{"params": [model.bias_ih_l0], "lr": 1.0}, {"params": [model.bias_hh_l0], "lr": 0.0}]
    with pytest.raises(regkit.StepError, match="different learning rates"):
        SGD(groups).step()


def test_what_padding_would_reach_is_refused():
    model = nn.GRU(3, 4)
    attachment = regkit.attach(model, {"rules": [{"target": {"role": "state"}, "penalty": "activity_l2(1)"}]})
    with attachment.lengths([5, 2]):
        model(torch.randn(5, 2, 3))
    with pytest.raises(regkit.StepError, match="state of a padded batch is computed from its padding"):
        attachment.penalty()
    attachment.detach()
    attachment = regkit.attach(model, AR)
    with attachment.mask(torch.ones(5, 2).bool()):
        model(nn.utils.rnn.pack_padded_sequence(torch.randn(5, 2, 3), torch.tensor([5, 2])))
    with pytest.raises(regkit.StepError, match=r"mask\(\) was given for a packed sequence"):
        attachment.penalty()


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
