"""Traps around activity: what waits, what is skipped, what is changed in place, and where time and padding go wrong."""

from __future__ import annotations

import asyncio
import gc

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import regkit
from regkit.recording.tickets import Ticket

AR = {"rules": [{"name": "ar", "penalty": "activity_l2(1)"}]}
TAR = {"rules": [{"name": "tar", "penalty": "temporal(1)"}]}


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


def test_two_loops_over_a_cell_each_begin_their_time_anew():
    cell = nn.GRUCell(3, 4)
    attachment = regkit.attach(cell, {"rules": [{"penalty": "activity_l2(1, reduction=sum)"}]})
    x, wanted = torch.randn(3, 2, 3), torch.zeros(())
    with attachment.lengths([3, 1]):
        for _ in range(2):
            h = None
            for time in range(3):
                h = cell(x[time], h)
                wanted = wanted + h[: 2 if time == 0 else 1].square().sum()
    torch.testing.assert_close(attachment.penalty(), wanted)


def test_a_line_search_on_one_network_may_pass_by_what_another_has_recorded():
    model = nn.ModuleDict({"generator": nn.GRU(2, 3), "critic": nn.Linear(3, 1)})
    regkit.attach(model, AR)
    made, _ = model["generator"](torch.randn(4, 1, 2))
    critic = torch.optim.LBFGS(model["critic"].parameters(), max_iter=4)

    def closure() -> Tensor:
        critic.zero_grad()
        loss = model["critic"](made.detach()).square().sum()
        loss.backward()
        return loss

    critic.step(closure)


def a_masked_loop(attachment: regkit.Attachment, cell: nn.GRUCell, mask: Tensor, h: Tensor) -> Tensor:
    """TAR, by hand, of a loop that begins from h, which is a neighbour if it was computed."""
    total, before, computed = torch.zeros(()), torch.ones_like(mask[0]), h.grad_fn is not None
    for now in mask:
        previous = h
        with attachment.mask(now):
            h = cell(torch.zeros(len(now), 3), h)
        if computed:
            total = total + ((h - previous).square() * (now & before)[:, None]).sum()
        before, computed = now, True
    return total


def test_a_masked_loop_that_begins_from_an_encoders_state_does_not_know_the_batch_before():
    cell, state = nn.GRUCell(3, 4), torch.randn(2, 4, requires_grad=True)
    attachment = regkit.attach(cell, {"rules": [{"penalty": "temporal(1, reduction=sum)"}]})
    mask = torch.tensor([[1, 1], [1, 0]]).bool()
    for _ in range(2):
        wanted = a_masked_loop(attachment, cell, mask, state * 1.0)
        torch.testing.assert_close(attachment.penalty(), wanted)


def test_the_last_batch_of_masked_loops_may_be_smaller():
    cell = nn.GRUCell(3, 4)
    attachment = regkit.attach(cell, {"rules": [{"penalty": "temporal(1, reduction=sum)"}]})
    for batch in (2, 1):
        wanted = a_masked_loop(attachment, cell, torch.ones(2, batch).bool(), torch.zeros(batch, 4))
        torch.testing.assert_close(attachment.penalty(), wanted)


STATES = {"rules": [{"target": {"role": "state"}, "penalty": "activity_l2(1)"}]}


@pytest.mark.parametrize("rules", [AR, STATES])
def test_calls_in_two_modes_are_an_error_and_calls_in_evaluation_mode_alone_are_none(rules):
    """As where a part of a model is trained in evaluation mode from the first step to the last."""
    model = nn.GRU(3, 4)
    attachment = regkit.attach(model, rules)
    for first in (True, False):
        for training in (first, False):
            model.train(training)
            model(torch.randn(5, 2, 3))
        if first:
            with pytest.raises(regkit.StepError, match="1 of 2 recorded outputs of the model were made in eval mode"):
                attachment.penalty()
            attachment.discard()
        else:
            assert attachment.penalty() > 0


def test_a_final_state_that_is_changed_in_place_before_it_is_penalized_is_an_error():
    model = nn.GRU(3, 4)
    attachment = regkit.attach(model, STATES)
    model(torch.randn(5, 2, 3))[1].mul_(2)
    with pytest.raises(regkit.StepError, match="state of the model was changed in place"):
        attachment.penalty()


def test_outputs_from_before_a_step_of_others_and_from_after_it_are_not_penalized_together():
    model = nn.ModuleDict({"rnn": nn.GRU(3, 4), "head": nn.Linear(4, 1)})
    attachment = regkit.attach(model, AR)
    model["rnn"](torch.randn(5, 2, 3))
    model["head"](torch.randn(2, 4)).sum().backward()
    SGD(model["head"].parameters(), lr=0.1).step()
    model["rnn"](torch.randn(5, 2, 3))
    with pytest.raises(regkit.StepError, match="from before an optimizer's step and from after it"):
        attachment.penalty()


@pytest.mark.parametrize("looked_at", [False, True])
def test_a_forward_pass_behind_the_penalty_is_not_covered_by_it(looked_at):
    model = nn.GRU(3, 4)
    attachment = regkit.attach(model, AR)
    optimizer = SGD(model.parameters(), lr=0.1)
    (model(torch.randn(5, 2, 3))[0].sum() + attachment.penalty()).backward()
    model(torch.randn(5, 2, 3))
    if looked_at:
        attachment.values()
    with pytest.raises(regkit.StepError, match="not consumed before the optimizer's step"):
        optimizer.step()


def test_outputs_that_were_discarded_after_a_step_of_others_are_forgotten_altogether():
    model = nn.ModuleDict({"rnn": nn.GRU(3, 4), "head": nn.Linear(4, 1)})
    attachment = regkit.attach(model, AR)
    model["rnn"](torch.randn(5, 2, 3))
    model["head"](torch.randn(2, 4)).sum().backward()
    SGD(model["head"].parameters(), lr=0.1).step()
    attachment.discard()
    outputs = [model["rnn"](torch.randn(5, 2, 3))[0] for _ in range(2)]
    torch.testing.assert_close(attachment.penalty(), torch.cat(outputs).square().mean())


def around_a_frozen_module() -> tuple[nn.ModuleList, list[torch.optim.Optimizer]]:
    """A model whose middle is not trained, though what is before it is, through it."""
    model = nn.ModuleList([nn.Linear(3, 3), nn.LSTM(3, 4).requires_grad_(False), nn.Linear(4, 1)])
    return model, [SGD(model[0].parameters(), lr=0.1), SGD(model[2].parameters(), lr=0.1)]


def test_the_outputs_of_a_frozen_module_between_two_optimizers_must_be_in_the_loss():
    model, optimizers = around_a_frozen_module()
    attachment = regkit.attach(model, AR)
    model[2](model[1](model[0](torch.randn(2, 2, 3)))[0]).sum().backward()
    with pytest.raises(regkit.StepError, match="not consumed"):
        optimizers[0].step()
    attachment.penalty()  # is thrown away
    model[2].zero_grad()
    optimizers[1].step()  # trains nothing
    with pytest.raises(regkit.StepError, match="was not part of a loss that was backpropagated"):
        optimizers[0].step()


def test_a_frozen_module_need_not_be_run_in_a_step_of_others():
    model, optimizers = around_a_frozen_module()
    attachment = regkit.attach(model, AR)
    for _ in range(2):
        model[0](torch.randn(2, 2, 3)).sum().backward()
        optimizers[0].step()
    assert attachment.step_count == 2


def test_of_the_penalties_on_a_frozen_module_none_is_kept_for_long():
    model, optimizers = around_a_frozen_module()
    attachment = regkit.attach(model, AR)
    for _ in range(6):
        (model[2](model[1](model[0](torch.randn(2, 2, 3)))[0]).sum() + attachment.penalty()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    gc.collect()
    assert sum(type(one) is Ticket for one in gc.get_objects()) == 1


def test_lengths_that_are_left_out_of_order_are_an_error_and_stay_in_force_nowhere():
    layer = nn.GRU(3, 4)
    attachment = regkit.attach(layer, {"rules": [{"name": "ar", "penalty": "activity_l2(1)"}]})
    outer, inner = attachment.lengths([1, 2]), attachment.mask(torch.ones(3, 2, dtype=torch.bool))
    outer.__enter__()
    inner.__enter__()
    for one in (outer, inner):
        with pytest.raises(regkit.StepError, match="left in another order than they were entered"):
            one.__exit__(None, None, None)
    h, _ = layer(torch.ones(3, 2, 3))
    torch.testing.assert_close(attachment.penalty(), h.square().mean())


def test_coroutines_that_run_one_model_in_turns_within_lengths_are_told():
    layer = nn.GRU(3, 4)
    attachment = regkit.attach(layer, {"rules": [{"penalty": "activity_l2(1)"}]})

    async def run(lengths: list[int]) -> None:
        with attachment.lengths(lengths):
            await asyncio.sleep(0)
            layer(torch.ones(3, 2, 3))

    async def both() -> list[BaseException | None]:
        return await asyncio.gather(run([1, 2]), run([3, 3]), return_exceptions=True)

    assert any(isinstance(one, regkit.StepError) and "coroutines" in str(one) for one in asyncio.run(both()))


def test_lengths_within_lengths_hold_each_in_its_place():
    layer = nn.GRU(3, 4)
    attachment = regkit.attach(layer, {"rules": [{"penalty": "activity_l2(1)"}]})
    x = torch.randn(3, 2, 3)
    with attachment.lengths([1, 2]):
        with attachment.lengths([3, 3]):
            whole, _ = layer(x)
        part, _ = layer(x)
    rows = torch.cat([whole.flatten(0, 1), part[:1, 0], part[:2, 1]])
    torch.testing.assert_close(attachment.penalty(), rows.square().mean())
