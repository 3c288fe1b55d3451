"""What autograd promises, activity penalties in closed form keep."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

import regkit
from tests.support.activity_forms import KINDS, by_autograd, document, gradients, make, padded, same, whole


def test_an_output_that_is_changed_in_place_after_penalty_is_still_found_out():
    model, x = make(nn.LSTM)
    attachment = regkit.attach(model, document(["activity_l2"]))
    h, _ = model(x)
    total = attachment.penalty()
    with torch.no_grad():
        h.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_a_graph_that_is_kept_goes_back_twice_and_one_that_is_not_does_not():
    model, x = make(nn.GRU)
    attachment = regkit.attach(model, document(KINDS))
    model(x)
    total = attachment.penalty()
    weights = list(model.parameters())
    first, again = (torch.autograd.grad(total, weights, retain_graph=True) for _ in range(2))
    same(list(again), list(first))
    torch.autograd.grad(total, weights)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(total, weights)


def test_the_result_may_be_added_to_in_place():
    model, x = make(nn.GRU)
    attachment = regkit.attach(model, document(["activity_l2"]))
    loss_of_model = model(x)[0].sum()
    loss = attachment.penalty()
    alone = attachment.values()["0"].clone()
    loss += loss_of_model
    loss.backward()
    assert attachment.values()["0"] == alone


def test_tensors_that_are_saved_elsewhere_come_back_as_they_were_laid_out():
    """`save_on_cpu` gives them back contiguous, whatever they were."""
    model, x = make(nn.LSTM, bidirectional=True, batch_first=True)

    def run() -> list[Tensor]:
        with torch.autograd.graph.save_on_cpu():
            return gradients(model, document(KINDS), padded, x)

    same(run(), by_autograd(lambda: gradients(model, document(KINDS), padded, x)))


def test_the_graph_holds_the_output_once_for_all_rules_and_no_more():
    model, x = make(nn.LSTM, bidirectional=True)
    attachment = regkit.attach(model, document(KINDS))
    h, _ = model(x)
    held: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: held.append(one) or one, lambda one: one):
        attachment.penalty()
    assert [one.data_ptr() for one in held] == [h.data_ptr()]


def test_anomaly_mode_and_autocast_around_the_backward_pass_change_nothing():
    model, x = make(nn.LSTM)
    model, x = model.float(), x.float()
    plain = gradients(model, document(KINDS), whole, x)
    with torch.autograd.set_detect_anomaly(True):
        same(gradients(model, document(KINDS), whole, x), plain)
    attachment = regkit.attach(model, document(KINDS))
    loss = 0.1 * whole(model, attachment, x) + 3.0 * attachment.penalty()
    with torch.autocast("cpu"):
        ours = torch.autograd.grad(loss, list(model.parameters()))
    for one, other in zip(ours, plain[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)  # torch's own part is cast


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own forward mode
def test_what_carries_a_tangent_forward_is_left_to_autograd():
    model, x = make(nn.RNN)
    attachment = regkit.attach(model, document(["activity_l2"]))
    (recorder,) = attachment._rules.recorders
    with forward_ad.dual_level():
        h, state = model(x)
        attachment.discard()
        direction = torch.randn_like(h)
        recorder(model, (x,), {}, (forward_ad.make_dual(h, direction), state))
        tangent = forward_ad.unpack_dual(attachment.penalty()).tangent
    torch.testing.assert_close(tangent, 0.5 * 2 * (h * direction).mean(), rtol=1e-12, atol=0)


def test_a_backward_pass_of_many_gradients_at_once_is_left_to_autograd_too():
    model, x = make(nn.GRU)
    attachment = regkit.attach(model, document(KINDS))
    model(x)
    total, weights = attachment.penalty(), list(model.parameters())
    one_by_one = [torch.autograd.grad(total, weights, factor, retain_graph=True) for factor in torch.arange(3).double()]
    at_once = torch.autograd.grad(total, weights, torch.arange(3).double(), is_grads_batched=True)
    same(list(at_once), [torch.stack(each) for each in zip(*one_by_one, strict=True)])


def test_a_functional_call_has_the_gradients_of_the_weights_it_was_given():
    model, x = make(nn.RNN)
    free = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    attachment = regkit.attach(model, document(["activity_l2"]))
    h = functional_call(model, free, x)[0]
    ours = torch.autograd.grad(attachment.penalty(), list(free.values()), retain_graph=True)
    same(list(ours), list(torch.autograd.grad(0.5 * h.square().mean(), list(free.values()))))


@pytest.mark.parametrize("layer", [nn.LSTM, nn.LSTMCell])
def test_what_the_penalty_is_of_goes_with_the_graph_though_the_loss_is_kept(layer):
    """A list of losses, as loops keep it, holds no batch."""
    model = layer(3, 4)
    in_time = {"penalty": "temporal(1)", "optional": True}
    attachment = regkit.attach(model, {"rules": [{"penalty": "activity_l2(1)"}, in_time]})
    result = model(torch.randn(5, 3))
    seen = weakref.ref(result[0])
    loss = attachment.penalty()
    loss.backward()
    del result
    assert seen() is None


def test_outputs_that_are_saved_elsewhere_are_held_nowhere_else():
    model = nn.LSTM(3, 4)
    attachment = regkit.attach(model, {"rules": [{"penalty": "activity_l2(1)"}]})
    with torch.autograd.graph.saved_tensors_hooks(lambda one: one.detach().clone(), lambda one: one):
        h, state = model(torch.randn(5, 2, 3))
        seen, loss = weakref.ref(h), attachment.penalty()
    del h, state
    assert seen() is None
    loss.backward()


def test_a_module_whose_layout_is_changed_is_read_as_it_is_laid_out_now():
    model = nn.GRU(3, 4)
    attachment = regkit.attach(model, {"rules": [{"penalty": "temporal(1)"}]})
    model(torch.randn(5, 2, 3))
    attachment.penalty()
    model.batch_first = True
    h, _ = model(torch.randn(2, 5, 3))
    torch.testing.assert_close(attachment.penalty(), (h[:, 1:] - h[:, :-1]).square().mean())
