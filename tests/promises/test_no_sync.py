"""A step never waits for the device, but where it looks for NaN: when rules are attached, and then at every 64th step.

These are all the waits that there are, of weights on a GPU:

- `attach` tries the kinds, and looks at every weight.
- The backward passes before the first step of an optimizer: the watchdog compares one weight with what it was (at most
  256 times; a first step ends it for good). One pass before the first step is none: there is nothing to compare with.
- Steps 0, 64, 128, …: one wait for all weights, whether they are finite.
- Every step of a fused optimizer inside a GradScaler: whether it is skipped. (Of all others the scaler asks itself.)
- A proximal or decoupled rule on the sum of two biases, where these are in groups with learning rates that are
  different tensors: whether they are equal.
- `loss_scale=scaler.get_scale`, for rules via inject: the scaler reads its scale at each backward pass.
- Weights that processes share (FSDP2, tensor parallelism) are gathered, which waits for the other processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import regkit
from regkit.registry.registry import default
from tests.support.every_rule import ON_ACTIVITY, ON_WEIGHTS, Document, attached, kind_of
from tests.support.waiting import answers, copies, make_fake


def test_every_kind_that_comes_with_regkit_is_looked_at_here():
    seen = {kind_of(rule)["kind"] for rules in [*ON_WEIGHTS.values(), *ON_ACTIVITY.values()] for rule in rules}
    assert seen == {entry.name for entry in default().entries("penalty", "activity penalty", "constraint")}


def layer_for(rules: Document) -> type[nn.RNNBase]:
    """The quickest layer that has what the rules are about."""
    return nn.LSTM if "gate" in rules[0]["target"] else nn.RNN


def train(model: nn.Module, attachment: regkit.Attachment, forward: Callable[[], Tensor]) -> None:
    """Two steps, and everything that can be asked of the rules, after each."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    attachment.values()  # when nothing was penalized yet
    for _ in range(2):
        optimizer.zero_grad()
        loss = forward().square().mean() + attachment.penalty()
        loss.backward()
        optimizer.step()
        attachment.apply_constraints()
        shown = {**attachment.values(), **attachment.violations()}
        assert {one.device.type for one in (loss, *shown.values())} == {"meta"}
        assert [tuple(one.shape) for one in shown.values()] == [()] * len(attachment.plan.bindings)
    assert attachment.step_count == 2


@pytest.mark.parametrize("rules", [*ON_WEIGHTS.values(), *ON_ACTIVITY.values()], ids=[*ON_WEIGHTS, *ON_ACTIVITY])
def test_a_whole_training_step_reads_nothing_back_and_waits_for_no_copy(rules: Document):
    model = layer_for(rules)(3, 4, device="meta")
    attachment = attached(model, rules)
    with copies() as waited:
        train(model, attachment, lambda: model(torch.randn(3, 2, 3, device="meta"))[0])
    assert waited == []


@pytest.mark.parametrize("via", ["loss", "inject"])
class TestEveryActivityPenaltyOf:
    def test_a_packed_sequence(self, via: str):
        model = nn.GRU(3, 4, bidirectional=True, device="meta")
        attachment = attached(model, ON_ACTIVITY[via])

        def forward() -> Tensor:
            packed: PackedSequence = pack_padded_sequence(torch.randn(5, 3, 3, device="meta"), torch.tensor([5, 3, 2]))
            return model(packed)[0].data

        with copies() as waited:
            train(model, attachment, forward)
        assert waited == []

    @pytest.mark.parametrize("at", ["cpu", "meta"])
    def test_padded_batches_with_lengths_and_masks(self, via: str, at: str):
        model = nn.GRU(3, 4, device="meta")
        attachment = attached(model, ON_ACTIVITY[via])
        lengths = torch.tensor([5, 3]) if at == "cpu" else torch.ones(2, dtype=torch.int64, device=at)

        def forward() -> Tensor:
            with attachment.lengths(lengths):
                first = model(torch.randn(5, 2, 3, device="meta"))[0]
            with attachment.mask(torch.ones(5, 2, dtype=torch.bool, device=at)):
                return first + model(torch.randn(5, 2, 3, device="meta"))[0]

        with copies() as waited:
            train(model, attachment, forward)
        assert waited == []

    def test_a_cell_in_a_loop(self, via: str):
        model = nn.GRUCell(3, 4, device="meta")
        attachment = attached(model, ON_ACTIVITY[via])

        def forward() -> Tensor:
            h = torch.zeros(2, 4, device="meta")
            with attachment.lengths([3, 1]):
                for _ in range(3):
                    h = model(torch.randn(2, 3, device="meta"), h)
            return h

        with copies() as waited:
            train(model, attachment, forward)
        assert waited == []


# --- what a wait looks like ------------------------------------------------------------------------------------------


class Reads(regkit.Penalty):
    """A kind that asks for a number at each step."""

    kind: Literal["reads"] = "reads"

    def value(self, w: Tensor) -> Tensor:
        return w.sum() if w.detach().sum().item() >= 0 else -w.sum()


class Fetches(regkit.Penalty):
    """A kind that computes on the CPU."""

    kind: Literal["fetches"] = "fetches"

    def value(self, w: Tensor) -> Tensor:
        return w.cpu().square().sum().to(w.device)


class Sends(regkit.Penalty):
    """A kind that keeps a table on the CPU."""

    kind: Literal["sends"] = "sends"

    def value(self, w: Tensor) -> Tensor:
        return (w * torch.ones(w.shape[-1]).to(w.device)).sum() + torch.tensor(1.0, device=w.device)


@pytest.mark.parametrize(("kind", "what"), [(Reads, "item"), (Fetches, "Cannot copy out of meta")])
def test_a_kind_that_reads_back_does_not_get_through(kind: type[regkit.Penalty], what: str):
    model = nn.RNN(3, 4, device="meta")
    attachment = regkit.attach(
        model, {"rules": [{"penalty": f"{kind.kind_name()}(1)"}]}, registry=regkit.Registry([kind])
    )
    with pytest.raises(regkit.StepError, match=what):
        train(model, attachment, lambda: model(torch.randn(3, 2, 3, device="meta"))[0])


def test_a_kind_that_sends_something_and_waits_is_seen():
    model = nn.RNN(3, 4, bias=False, device="meta")
    attachment = regkit.attach(model, {"rules": [{"penalty": "sends(1)"}]}, registry=regkit.Registry([Sends]))
    with copies() as waited:
        train(model, attachment, lambda: model(torch.randn(3, 2, 3, device="meta"))[0])
    assert set(waited) == {"_to_copy from cpu to meta", "tensor"}


# --- which steps wait ------------------------------------------------------------------------------------------------


L2 = [{"penalty": "l2(1)"}]


def pseudo_loss(model: nn.Module) -> Tensor:
    """Something that every weight takes part in."""
    return torch.stack([parameter.square().sum() for parameter in model.parameters()]).sum()


@pytest.mark.parametrize("rules", ON_WEIGHTS.values(), ids=ON_WEIGHTS)
def test_only_the_first_step_and_every_64th_wait_and_each_once(rules: Document):
    """On tensors that hold no numbers either, but are not on meta: what regkit leaves out there is in."""
    model, mode = layer_for(rules)(3, 4), FakeTensorMode()
    attachment = attached(model, rules)
    make_fake(model, mode)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    waited = {}
    with mode, answers() as asked, copies() as copied:
        for step in (0, 1, 63, 64, 65):
            attachment.load_state_dict({**attachment.state_dict(), "step_count": step})
            optimizer.zero_grad()
            (pseudo_loss(model) + attachment.penalty()).backward()
            optimizer.step()
            attachment.apply_constraints()
            attachment.values()
            attachment.violations()
            if found := asked():
                waited[step] = found
    assert waited == {0: ["engine.finite"], 64: ["engine.finite"]}
    assert copied == []


def test_without_an_answer_such_a_wait_is_an_error():
    model, mode = nn.LSTM(3, 4), FakeTensorMode()
    attached(model, L2)
    make_fake(model, mode)
    with mode:
        pseudo_loss(model).backward()
        with pytest.raises(DataDependentOutputException):
            torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_the_watchdog_waits_in_backward_passes_before_the_first_step_and_never_after_it():
    model, mode = nn.LSTM(3, 4), FakeTensorMode()
    attachment = attached(model, L2)
    make_fake(model, mode)
    attachment.weights_changed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    waited = []
    with mode, answers() as asked:
        for _ in range(2):
            for _ in range(3):
                pseudo_loss(model).backward()
                waited.append(asked())
            optimizer.step()
            waited.append(asked())
    assert waited == [[], ["engine.watchdog"], ["engine.watchdog"], ["engine.finite"], [], [], [], []]


class SelfScaling(torch.optim.Optimizer):
    """Divides by the loss scale itself and reads nothing back, neither that nor a learning rate: as fused ones do."""

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad if self.grad_scale is None else parameter.grad / self.grad_scale
                parameter -= gradient * group["lr"]


def test_a_fused_optimizer_in_a_scaler_is_asked_whether_it_skips_at_every_step():
    model, mode = nn.LSTM(3, 4), FakeTensorMode()
    attached(model, L2)
    make_fake(model, mode)
    optimizer = SelfScaling(model.parameters(), {"lr": 0.1})
    with mode, answers() as asked:
        pseudo_loss(model).backward()
        optimizer.grad_scale, optimizer.found_inf = (
            torch.ones((), device="lazy") for _ in range(2)
        )  # as a scaler does
        waited = []
        for _ in range(3):
            optimizer.step()
            waited.append(asked())
    assert waited == [["engine.tracker", "engine.finite"], ["engine.tracker"], ["engine.tracker"]]


@pytest.mark.parametrize(("rates", "waits"), [(1, False), (2, True)])
def test_a_learning_rate_on_the_device_is_read_back_only_to_be_compared_with_another(rates: int, waits: bool):
    model, mode = nn.LSTM(3, 4), FakeTensorMode()
    attached(model, ON_WEIGHTS["sum of biases"])
    make_fake(model, mode)
    with mode, answers() as asked:
        lrs = [torch.ones((), device="lazy") for _ in range(rates)]
        groups = [{"params": [p], "lr": lrs[i % rates]} for i, p in enumerate(model.parameters())]
        optimizer = SelfScaling(groups, {})
        pseudo_loss(model).backward()
        optimizer.step()
        asked()
        optimizer.step()
        assert asked() == ["rules.penalty_rule"] * waits
