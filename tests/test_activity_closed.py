"""Activity penalties go back through the graph in closed form: autograd's gradients, in less time and memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from laws import REDUCTIONS
from test_list_forms import Seen, tensors
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence

import regkit
from regkit import Activity, ActivityPenalty, closed
from regkit.activity import Sequenced

KINDS = ["activity_l1", "activity_l2", {"kind": "activity_l1_l2", "l1": 0.3, "l2": 0.2}, "temporal", "norm_stabilizer"]


def document(kinds: list[Any], reduction: str = "mean", role: str = "output") -> dict[str, Any]:
    rules = []
    for number, kind in enumerate(kinds):
        options = {"kind": kind} if isinstance(kind, str) else kind
        penalty = {**options, "strength": 0.5 + number, "reduction": reduction}
        rules.append({"name": str(number), "target": {"role": role}, "penalty": penalty})
    return {"rules": rules}


Loop = Callable[[nn.Module, regkit.Attachment, Tensor], Tensor]


def whole(model: nn.Module, _: regkit.Attachment, x: Tensor) -> Tensor:
    return model(x)[0].sum()


def padded(model: nn.Module, attachment: regkit.Attachment, x: Tensor) -> Tensor:
    with attachment.lengths([5, 2, 4, 3]):
        return model(x)[0].square().sum()


def with_a_mask(model: nn.Module, attachment: regkit.Attachment, x: Tensor) -> Tensor:
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    mask[2, 1] = mask[3, 3] = mask[0, 0] = False
    with attachment.mask(mask):
        return model(x)[0].square().sum()


def packed(model: nn.Module, _: regkit.Attachment, x: Tensor) -> Tensor:
    lengths = [5, 2, 4, 1]
    return model(pack_padded_sequence(x, lengths, model.batch_first, enforce_sorted=False))[0].data.square().sum()


def unbatched(model: nn.Module, _: regkit.Attachment, x: Tensor) -> Tensor:
    return model(x[0] if model.batch_first else x[:, 0])[0].sum()


def two_calls(model: nn.Module, _: regkit.Attachment, x: Tensor) -> Tensor:
    first, state = model(x[:3])
    return model(x[3:], state)[0].sum() + first.sum()


def cell(model: nn.Module, attachment: regkit.Attachment, x: Tensor) -> Tensor:
    state: Any = None
    with attachment.lengths([5, 2, 4, 3]):
        for step in x:
            state = model(step, state)
    return (state[0] if isinstance(state, tuple) else state).sum()


def cell_of_one_sequence(model: nn.Module, _: regkit.Attachment, x: Tensor) -> Tensor:
    state: Any = None
    for step in x[:, 0]:
        state = model(step, state)
    return (state[0] if isinstance(state, tuple) else state).sum()


def cell_that_branches(model: nn.Module, _: regkit.Attachment, x: Tensor) -> Tensor:
    """Several calls go on from one state, which begins as a function of the input."""
    state = model(x[0], x[0, :, :1].expand(-1, 4) * 2)
    return torch.stack([model(step, state) for step in x[1:]]).sum()


FORMS = [
    *((nn.LSTM, options, loop) for options in ({}, {"bidirectional": True}) for loop in (whole, padded, packed)),
    (nn.GRU, {"bidirectional": True}, with_a_mask),
    (nn.GRU, {"bidirectional": True, "batch_first": True}, padded),
    (nn.RNN, {"bidirectional": True, "batch_first": True}, unbatched),
    (nn.LSTM, {"batch_first": True, "proj_size": 2}, padded),
    (nn.LSTM, {"num_layers": 2, "batch_first": True}, packed),
    (nn.GRU, {}, two_calls),
    *((layer, {}, cell) for layer in (nn.RNNCell, nn.LSTMCell, nn.GRUCell)),
    (nn.LSTMCell, {}, cell_of_one_sequence),
    (nn.GRUCell, {}, cell_that_branches),
]
EVERY_FORM = pytest.mark.parametrize(
    ("layer", "options", "loop"),
    FORMS,
    ids=[f"{layer.__name__}-{'-'.join(options)}-{loop.__name__}" for layer, options, loop in FORMS],
)


def make(layer: type[nn.Module], **options: Any) -> tuple[nn.Module, Tensor]:
    """A module of 3 inputs and 4 units, and 4 sequences of 5 steps for it."""
    torch.manual_seed(1)
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    return layer(3, 4, **options).double(), x.transpose(0, 1) if options.get("batch_first") else x


@pytest.fixture
def by_autograd(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], Any]:
    """Runs a function with all penalties left to autograd."""

    def run(function: Callable[[], Any]) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(closed, "_plain", lambda: False)
            return function()

    return run


def gradients(model: nn.Module, spec: dict[str, Any], loop: Loop, x: Tensor, twice: bool = False) -> list[Tensor]:
    """Of the loss and the penalty, by the weights and by x; twice: of the norm of those."""
    model, x = copy.deepcopy(model), x.clone().requires_grad_()
    with regkit.attach(model, spec) as attachment:
        loss = 0.1 * loop(model, attachment, x) + 3.0 * attachment.penalty()
    wanted = [x, *model.parameters()]
    found = torch.autograd.grad(loss, wanted, create_graph=twice)
    if twice:
        found = torch.autograd.grad(sum(one.square().sum() for one in found), wanted, allow_unused=True)
    return [torch.zeros(()) if one is None else one for one in found]


def same(ours: list[Tensor], wanted: list[Tensor]) -> None:
    for one, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@EVERY_FORM
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_gradients_are_those_of_autograd(layer, options, loop, reduction, by_autograd):
    model, x = make(layer, **options)
    spec = document(KINDS, reduction)
    ours = gradients(model, spec, loop, x)
    same(ours, by_autograd(lambda: gradients(model, spec, loop, x)))
    assert not torch.allclose(ours[0], gradients(model, document(KINDS[:1], reduction), loop, x)[0])


@EVERY_FORM
def test_so_are_gradients_of_gradients(layer, options, loop, by_autograd):
    model, x = make(layer, **options)
    ours = gradients(model, document(KINDS), loop, x, twice=True)
    same(ours, by_autograd(lambda: gradients(model, document(KINDS), loop, x, twice=True)))


@pytest.mark.parametrize(("role", "options"), [("state", {"num_layers": 2}), ("cell", {"bidirectional": True})])
@pytest.mark.parametrize("layers", [None, [0]])
def test_final_states_have_it_too_and_so_have_some_of_their_layers(role, options, layers, by_autograd):
    model, x = make(nn.LSTM, **options)
    spec = document(["activity_l1", "activity_l2"], role=role)
    if layers is not None and "num_layers" in options:
        for rule in spec["rules"]:
            rule["target"]["layer"] = layers
    same(gradients(model, spec, whole, x), by_autograd(lambda: gradients(model, spec, whole, x)))


@pytest.mark.parametrize("loop", [whole, padded, packed])
def test_large_outputs_go_through_in_pieces_and_small_ones_together_to_the_same_end(loop, by_autograd, monkeypatch):
    model, x = make(nn.LSTM, bidirectional=True)
    expected = by_autograd(lambda: gradients(model, document(KINDS), loop, x))
    for size in (1, 200, 400):
        monkeypatch.setattr("regkit.reduction.room", lambda device, size=size: size)
        same(gradients(model, document(KINDS), loop, x), expected)
    model, x = make(nn.GRUCell)
    expected = by_autograd(lambda: gradients(model, document(KINDS), cell, x))
    for size in (1, 200, 400):
        monkeypatch.setattr("regkit.reduction.room", lambda device, size=size: size)
        same(gradients(model, document(KINDS), cell, x), expected)


def test_values_are_the_same_with_autograd_and_without(by_autograd):
    model, x = make(nn.LSTM, bidirectional=True)
    attachment = regkit.attach(model, document(KINDS))
    padded(model, attachment, x)
    looked_at = attachment.values()
    total = attachment.penalty()
    taken = attachment.values()
    padded(model, attachment, x)
    other = by_autograd(attachment.penalty)
    torch.testing.assert_close(total, other, rtol=1e-12, atol=0)
    for known in (looked_at, attachment.values()):
        torch.testing.assert_close(taken, known, rtol=1e-12, atol=0)
    torch.testing.assert_close(sum(taken.values()), total.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_and_rounded_as_it_is_added(dtype):
    model, x = make(nn.GRU)
    model, x = model.to(dtype), x.to(dtype)
    attachment = regkit.attach(model, {"rules": [{"penalty": "activity_l2(1, reduction=sum)"}]})
    h, _ = model(x)
    total = attachment.penalty() * 1024.0
    (gradient,) = torch.autograd.grad(total, h)
    assert total.dtype is torch.float32
    torch.testing.assert_close(gradient, (2048.0 * h.float()).to(dtype), rtol=0, atol=0)


# --- what autograd promises ------------------------------------------------------------------------------------------


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


def test_tensors_that_are_saved_elsewhere_come_back_as_they_were_laid_out(by_autograd):
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
    with forward_ad.dual_level():
        h, _ = model(x)
        attachment.discard()
        direction = torch.randn_like(h)
        dual = forward_ad.make_dual(h, direction)
        (term,) = closed.evaluate([term_of(attachment, dual)])[1]
        tangent = forward_ad.unpack_dual(term).tangent
    torch.testing.assert_close(tangent, 0.5 * 2 * (h * direction).mean(), rtol=1e-12, atol=0)


def term_of(attachment: regkit.Attachment, h: Tensor) -> closed.Term:
    (rule,) = attachment._rules.activities
    seen = closed.Seen(Activity([Sequenced(h)]), lambda: [h])
    return closed.Term(rule.binding.kind, rule.binding.kind.strength, seen, lambda function, *args: function(*args))


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


# --- strangers -------------------------------------------------------------------------------------------------------


class Cube(ActivityPenalty):
    """|h|³, left to autograd."""

    kind: Literal["cube"] = "cube"

    def value(self, activity: Activity) -> Tensor:
        return activity.reduce(lambda h: h.abs() ** 3, self.reduction)


class Fails(Cube):
    kind: Literal["fails"] = "fails"

    def add_gradients(self, activity: Activity, gradients: Activity, amount: Tensor) -> None:
        raise ZeroDivisionError("so it is")


class Doubles(Cube):
    kind: Literal["doubles"] = "doubles"

    def add_gradients(self, activity: Activity, gradients: Activity, amount: Tensor) -> None:
        activity.add_slopes(gradients, lambda h: h * h.abs(), amount, self.reduction, times=6)


class WrongShape(Cube):
    kind: Literal["wrong_shape"] = "wrong_shape"

    def add_gradients(self, activity: Activity, gradients: Activity, amount: Tensor) -> None:
        activity.add_slopes(gradients, lambda h: h.sum(-1, keepdim=True), amount)


@pytest.fixture
def strangers() -> Any:
    registry = regkit.Registry()
    for kind in (Cube, Doubles, Fails, WrongShape):
        registry.register(kind)
    return registry


def test_a_kind_without_closed_form_goes_beside_those_that_have_one(strangers):
    model, x = make(nn.LSTM)
    attachment = regkit.attach(model, document(["cube", "activity_l2"]), registry=strangers)
    h, _ = model(x)
    (ours,) = torch.autograd.grad(attachment.penalty(), h)
    torch.testing.assert_close(ours, (0.5 * 3 * h * h.abs() + 1.5 * 2 * h) / h.numel(), rtol=1e-12, atol=1e-12)


def test_a_closed_form_that_is_not_the_gradient_of_the_value_is_refused_as_it_is_attached(strangers):
    model, _ = make(nn.LSTM)
    for kind, words in (
        ("doubles", "add_gradients of .*Doubles does not add the gradient of its value"),
        ("fails", "ZeroDivisionError"),
        ("wrong_shape", r"a slope at \(5, 6\) has the shape|a slope at .* has the shape"),
    ):
        with pytest.raises(regkit.PluginError, match=words):
            regkit.attach(model, document([kind]), registry=strangers)
    assert not model._forward_hooks


def test_what_fails_in_the_backward_pass_says_whose_it_is(monkeypatch):
    model, x = make(nn.LSTM)
    attachment = regkit.attach(model, document(["activity_l2"]))

    def fails(*_: Any) -> None:
        raise ZeroDivisionError("so it is")

    model(x)
    total = attachment.penalty()
    monkeypatch.setattr(type(attachment._rules.activities[0].binding.kind), "add_gradients", fails)
    with pytest.raises(regkit.StepError, match=r"rule '0': .*activity_l2.* on the model: ZeroDivisionError"):
        total.backward()


class Foreign(Sequenced):
    """A segment whose class does not say how it is made of other tensors."""

    def at(self, place: Callable[[Tensor], Any]) -> None:
        return None


def test_segments_of_a_strangers_own_are_left_to_autograd(monkeypatch):
    model, x = make(nn.LSTM)
    expected = gradients(model, document(["activity_l2", "temporal"]), whole, x)
    attachment = regkit.attach(model, document(["activity_l2", "temporal"]))
    recorder = attachment._rules.recorders[0]
    own = recorder._adapter.segments
    monkeypatch.setattr(recorder, "_adapter", copy.copy(recorder._adapter))
    monkeypatch.setattr(
        recorder._adapter, "segments", lambda *args: [Foreign(one.h) for one in own(*args)], raising=False
    )
    loss = 0.1 * whole(model, attachment, x) + 3.0 * attachment.penalty()
    same(list(torch.autograd.grad(loss, list(model.parameters()))), expected[1:])


# --- what it costs ---------------------------------------------------------------------------------------------------


class Allocated(Seen):
    """Also the bytes of all tensors that are made anew."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        known = {one.untyped_storage()._cdata for one in tensors([*args, *(kwargs or {}).values()])}
        new = {one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in tensors(result)}
        self.bytes += sum(size for storage, size in new.items() if storage not in known)
        return result


def cost(kinds: list[Any], model: nn.Module, x: Any, wanted: Callable[[Any], list[Tensor]]) -> Allocated:
    """Of `penalty()` and its backward pass as far as the outputs."""
    with regkit.attach(model, document(kinds)) as attachment:
        outputs = wanted(model(x))
        with Allocated() as seen:
            torch.autograd.grad(attachment.penalty(), outputs)
    return seen


MB = 2**20


@pytest.mark.parametrize(
    ("kinds", "bytes_besides"),
    [
        (["activity_l2"], 1.25 * MB),
        (["activity_l2", "temporal"], 13 * MB),
        (["activity_l1"], 10 * MB),
        (["norm_stabilizer"], 17 * MB),
    ],
)
def test_all_that_is_as_large_as_the_output_is_one_gradient(kinds, bytes_besides):
    """The output of a bidirectional LSTM of 512 units, batch 32, 64 steps: 8 MB. Pieces of it come and go."""
    model = nn.LSTM(8, 512, bidirectional=True)
    seen = cost(kinds, model, torch.randn(64, 32, 8), lambda result: [result[0]])
    assert seen.largest == 8 * MB
    assert seen.bytes <= 8 * MB + bytes_besides


def test_nor_is_anything_as_large_made_of_a_packed_sequence():
    model = nn.LSTM(8, 512, bidirectional=True)
    lengths = [64 - 2 * (number // 2) for number in range(32)]
    x = pack_padded_sequence(torch.randn(64, 32, 8), torch.tensor(lengths))
    seen = cost(["activity_l2", "temporal"], model, x, lambda result: [result[0].data])
    gradient = sum(lengths) * 1024 * 4
    assert seen.largest == gradient
    assert seen.bytes <= 5 * gradient


@pytest.mark.parametrize(("kinds", "most"), [(["activity_l2"], 12), (["activity_l2", "temporal"], 40)])
def test_a_longer_sequence_takes_no_more_operations(kinds, most):
    counts = [
        cost(kinds, nn.GRU(3, 4), torch.randn(time, 2, 3), lambda result: [result[0]]).operations for time in (4, 400)
    ]
    assert counts[0] == counts[1] <= most


@pytest.mark.parametrize("kinds", [["activity_l2"], ["activity_l2", "temporal", "norm_stabilizer"]])
def test_nor_does_a_longer_loop_over_a_cell(kinds, monkeypatch):
    """Of `penalty()`, and of its own function in the backward pass; what is computed of small tensors is computed of
    all together."""
    backward = closed._Closed.backward
    seen = Seen()

    def counted(*args: Any) -> Any:
        with seen:
            return backward(*args)

    monkeypatch.setattr(closed._Closed, "backward", staticmethod(counted))

    def operations(time: int) -> int:
        model = nn.GRUCell(3, 4)
        with regkit.attach(model, document(kinds)) as attachment:
            h = None
            for step in torch.randn(time, 2, 3):
                h = model(step, h)
            seen.operations = 0
            with seen:
                total = attachment.penalty()
            total.backward()
        return seen.operations

    counts = [operations(time) for time in (4, 64, 256)]
    assert counts[0] == counts[1] == counts[2] <= 22 * len(kinds)


def test_what_holds_of_the_costs_does_not_hold_of_autograd(by_autograd):
    """So that what is asserted above can fail."""
    model, x = nn.LSTM(8, 512, bidirectional=True), torch.randn(64, 32, 8)
    seen = by_autograd(lambda: cost(["activity_l2", "temporal"], model, x, lambda result: [result[0]]))
    assert seen.bytes > 100 * MB
