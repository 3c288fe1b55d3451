"""On a GPU: no step waits, kernels do not grow in number with the weights, and a whole step can be a CUDA graph.

What is done is written for any device, and is tried on the CPU, where some of it is trivial.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.nn.utils.rnn import pack_padded_sequence
from torch.profiler import ProfilerActivity, profile

import regkit
from tests.support.counting import Counted
from tests.support.every_rule import ALL_TOGETHER, Document, attached

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NO_GPU)])
RULES: Document = [{"name": "l2", "penalty": "l2(0.01)"}, {"name": "ball", "constraint": "max_norm(0.5)"}]


# --- nothing is waited for -------------------------------------------------------------------------------------------


@contextmanager
def unwaited(device: str) -> Iterator[None]:
    """Inside, it is an error to wait for the GPU."""
    if device == "cpu":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def train(model: nn.Module, attachment: regkit.Attachment, forward: Callable[[], Tensor], device: str) -> None:
    """Four steps, of which the first may wait, and all that can be asked of the rules."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        (forward().square().mean() + attachment.penalty()).backward()
        optimizer.step()
        attachment.apply_constraints()
        shown = {**attachment.values(), **attachment.violations()}
        assert {one.device.type for one in shown.values()} == {device}

    step()
    with unwaited(device):
        for _ in range(3):
            step()
    assert attachment.step_count == 4
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


@DEVICES
@pytest.mark.parametrize("rules", ALL_TOGETHER, ids=range(len(ALL_TOGETHER)))
def test_no_rule_of_any_kind_waits_after_the_first_step(rules: Document, device: str):
    model = nn.LSTM(3, 4, num_layers=2, bidirectional=True, device=device)
    x = torch.randn(5, 2, 3, device=device)
    train(model, attached(model, rules), lambda: model(x)[0], device)


@DEVICES
@pytest.mark.parametrize("rules", ALL_TOGETHER[-2:], ids=["loss", "inject"])
def test_activity_of_packed_sequences_padded_batches_and_cells_is_not_waited_for(rules: Document, device: str):
    model = nn.ModuleDict({"gru": nn.GRU(3, 4), "cell": nn.GRUCell(3, 4)}).to(device)
    attachment = attached(model, rules)
    x, packed = (torch.randn(5, 2, 3, device=device) for _ in range(2))

    def forward() -> Tensor:
        with attachment.lengths([5, 2]):
            h = torch.zeros(2, 4, device=device)
            for x_t in x:
                h = model["cell"](x_t, h)
            padded = model["gru"](x)[0]
        return (
            h.mean() + padded.mean() + model["gru"](pack_padded_sequence(packed, torch.tensor([5, 2])))[0].data.mean()
        )

    train(model, attachment, forward, device)


# --- kernels ---------------------------------------------------------------------------------------------------------

LISTED = 28
"""Weights that one kernel of a list operation takes, whatever the operation: torch has more in several kernels."""


def kernels(run: Callable[[], object], device: str) -> int:
    """How many kernels it launches; on the CPU, how many operations it calls."""
    if device == "cpu":
        with Counted() as seen:
            run()
        return seen.operations
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as recorded:
        run()
        torch.cuda.synchronize()
    events = [event for event in recorded.events() if event.device_type == DeviceType.CUDA]
    return sum(not event.name.startswith(("Memset", "Memcpy")) for event in events)


def added(rule: dict[str, Any], weights: int, device: str) -> int:
    """How many kernels a rule adds to a step of so many weights, four in a cell."""
    model = nn.ModuleList([nn.GRUCell(3, 4) for _ in range(weights // 4)]).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    bare = kernels(optimizer.step, device)
    with regkit.attach(model, {"rules": [rule]}):
        optimizer.step()  # which looks whether the weights are finite
        return kernels(optimizer.step, device) - bare


@DEVICES
@pytest.mark.parametrize("rule", ["l2", "l1", "max_norm", "non_negative"])
def test_a_step_launches_as_many_kernels_more_for_many_weights_as_for_few(rule: str, device: str):
    on = "penalty" if rule in ("l1", "l2") else "constraint"
    written = {on: {"max_norm": "max_norm(1)", "non_negative": "non_negative"}.get(rule, f"{rule}(0.1)")}
    few = added(written, 8, device)
    assert few >= 1
    assert added(written, LISTED, device) == few
    assert added(written, 400, device) <= few * -(-400 // LISTED)


# --- a step as a graph -----------------------------------------------------------------------------------------------

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""From a step to one that replays it."""


def in_a_graph(step: Callable[[], None]) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def as_it_is(step: Callable[[], None]) -> Callable[[], None]:
    return step


def trained(rules: Document, device: str, capture: Capture | None) -> nn.LSTM:
    """A model after three steps, and four more: captured once and replayed, or taken like the first."""
    torch.manual_seed(1)
    model = nn.LSTM(3, 4).to(device)
    attachment = attached(model, rules)
    capturable = {"capturable": True} if device == "cuda" else {}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05, **capturable)
    batches = torch.randn(7, 5, 2, 3, generator=torch.Generator().manual_seed(2)).to(device)
    x = batches[0].clone()  # where a graph reads its batches

    def step() -> None:
        (model(x)[0].square().mean() + attachment.penalty()).backward()
        optimizer.step()

    def first() -> None:
        for batch in batches[:3]:
            x.copy_(batch)
            optimizer.zero_grad(set_to_none=True)
            step()
        optimizer.zero_grad(set_to_none=True)  # the graph makes gradients of its own, anew at each replay

    if device == "cuda":
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            first()
        torch.cuda.current_stream().wait_stream(aside)
    else:
        first()
    again = step if capture is None else capture(step)
    for batch in batches[3:]:
        x.copy_(batch)
        if again is step:
            optimizer.zero_grad(set_to_none=True)
        again()
    return model


WARMS_UP = pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True:UserWarning")
"""Before it is captured a step is taken a few times as it is, which Adam remarks upon."""


@WARMS_UP
@pytest.mark.parametrize(
    ("device", "capture"), [("cpu", as_it_is), pytest.param("cuda", in_a_graph, marks=NO_GPU)], ids=["cpu", "cuda"]
)
@pytest.mark.parametrize(
    "rules", [RULES, [*RULES, {"penalty": "activity_l2(0.1)"}, {"penalty": "l1(0.01)", "via": "proximal"}]]
)
def test_a_whole_step_captured_and_replayed_trains_as_steps_do(rules: Document, device: str, capture: Capture):
    eager, replayed = trained(rules, device, None), trained(rules, device, capture)
    bare = trained([{"penalty": "l2(1e-12)"}], device, capture)
    torch.testing.assert_close(replayed.state_dict(), eager.state_dict(), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(replayed.weight_hh_l0, bare.weight_hh_l0, atol=1e-3)
    assert float(regkit.attachments(replayed)[0].violations()["ball"]) <= 1e-5


@NO_GPU
@WARMS_UP
@pytest.mark.parametrize("more", [{"schedule": {"kind": "linear", "start": 1.0, "end": 2.0, "steps": 9}}, {"every": 2}])
def test_a_captured_step_that_depends_on_the_step_count_is_refused(more: dict[str, Any]):
    with pytest.raises(regkit.StepError, match="a CUDA graph is being captured"):
        trained([{"constraint": "max_norm(2)", **more}], "cuda", in_a_graph)


# --- what cuDNN and a scaler need ------------------------------------------------------------------------------------


@DEVICES
def test_the_weights_stay_where_cudnn_has_laid_them_out(device: str):
    """In one piece of memory; of another layout torch warns, which is an error here, and copies them at each step."""
    model = nn.LSTM(3, 4, num_layers=2, bidirectional=True).to(device)
    x = torch.randn(5, 2, 3, device=device)

    def layout() -> list[tuple[int, int, tuple[int, ...]]]:
        flat = model._flat_weights
        return [(w.data_ptr(), w.untyped_storage().data_ptr(), w.stride()) for w in flat]

    before = layout()
    if device == "cuda":
        assert len({storage for _, storage, _ in before}) == 1
    for rules in ALL_TOGETHER:
        with attached(model, rules) as attachment:
            train(model, attachment, lambda: model(x)[0], device)
        assert layout() == before


@DEVICES
@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_leaves_the_penalty_as_it_is(fused: bool, device: str):
    def run(scaled: bool) -> nn.GRU:
        torch.manual_seed(1)
        model = nn.GRU(3, 4).to(device)
        attached(model, RULES)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
        scaler = torch.amp.GradScaler(device, init_scale=1024.0, enabled=scaled)
        x = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(2)).to(device)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(model(x)[0].square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        return model

    torch.testing.assert_close(run(True).state_dict(), run(False).state_dict(), rtol=1e-5, atol=1e-6)
