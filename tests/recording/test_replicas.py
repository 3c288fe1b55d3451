"""Threads: replicas as torch.nn.DataParallel makes them, and models that threads share or do not share."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch._utils import ExceptionWrapper

import regkit
from tests.support.cells import AR_TAR, Looped, Sequenced, ar_tar, make
from tests.support.loops import assert_equal_weights

room = importlib.import_module("torch.nn.parallel.replicate")  # the package has a function of that name
KINDS = pytest.mark.parametrize("kind", [Looped, Sequenced])
WEIGHTS = {
    "rules": [
        {"name": "l2", "penalty": "l2(0.05)"},
        {"name": "ball", "target": {"role": "recurrent"}, "constraint": "max_norm(0.6)"},
    ]
}


def in_threads(calls: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
    """What they return, each in a thread of its own; an error in one is raised here, as torch's parallel_apply does."""
    results: dict[int, object] = {}
    start = threading.Barrier(len(calls))

    def run(index: int, call: Callable[[], Tensor]) -> None:
        start.wait()
        try:
            results[index] = call()
        except Exception:
            results[index] = ExceptionWrapper(where=f"in replica {index}")

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results.values():
        if isinstance(result, ExceptionWrapper):
            result.reraise()
    return [results[index] for index in range(len(calls))]


@pytest.fixture
def parallel(monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module, Tensor], Tensor]:
    """nn.DataParallel with two replicas on the CPU: torch's own replicate(), whose devices are all the same one."""
    monkeypatch.setattr(room, "_get_device_index", lambda device, optional: device)
    monkeypatch.setattr(
        room,
        "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach=False: [[tensor.clone() for tensor in tensors] for _ in devices],
    )

    def run(model: nn.Module, x: Tensor) -> Tensor:
        grad = torch.is_grad_enabled()

        def call(replica: nn.Module, part: Tensor) -> Tensor:
            with torch.set_grad_enabled(grad):
                return replica(part)

        replicas = room.replicate(model, [0, 0])
        parts = zip(replicas, x.chunk(2, dim=1), strict=True)
        return torch.cat(in_threads([lambda r=r, p=p: call(r, p) for r, p in parts]), dim=1)

    return run


@KINDS
@pytest.mark.works_with("DataParallel")
def test_weight_rules_are_right_on_a_model_that_runs_as_replicas(kind, parallel, batches):
    trained = []
    for run in (lambda model, x: model(x), parallel):
        model = make(kind)
        attachment = regkit.attach(model, WEIGHTS)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for x, y in batches:
            optimizer.zero_grad()
            nn.functional.mse_loss(run(model, x), y).backward()
            optimizer.step()
        assert attachment.step_count == len(batches)
        assert attachment.violations()["ball"] < 1e-12
        trained.append(model)
    assert_equal_weights(*trained)


@KINDS
@pytest.mark.works_with("DataParallel")
def test_activity_of_replicas_is_refused_with_the_cure_and_the_model_itself_still_trains(kind, parallel, batches):
    model = make(kind)
    attachment = regkit.attach(model, AR_TAR)
    x = batches[0][0]
    with torch.no_grad():
        torch.testing.assert_close(parallel(model, x), model(x))  # an evaluation
    with pytest.raises(regkit.StepError, match=r"rnn runs as a replica.*DistributedDataParallel"):
        parallel(model, x)
    model(x)
    torch.testing.assert_close(attachment.penalty(), ar_tar(model.outputs(x)))


@KINDS
@pytest.mark.works_with("DataParallel")
def test_a_model_in_data_parallel_without_replicas_trains_as_it_does_alone(kind, batches):
    """As on the CPU, or with one device: DataParallel then calls the module itself."""
    x = batches[0][0]
    model = make(kind)
    wrapped = nn.DataParallel(model)
    attachment = regkit.attach(wrapped, AR_TAR)
    wrapped(x)
    torch.testing.assert_close(attachment.penalty(), ar_tar(model.outputs(x)))


@KINDS
@pytest.mark.works_with("Threads")
def test_threads_that_each_train_a_model_of_their_own_do_not_disturb_one_another(kind, batches):
    spec = {"rules": [*AR_TAR["rules"], *WEIGHTS["rules"]]}

    def train(model: nn.Module, rounds: int) -> Tensor:
        attachment = regkit.attach(model, spec)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(rounds):
            for x, y in batches:
                with attachment.lengths([5, 4, 3, 2, 1, 5]):
                    loss = nn.functional.mse_loss(model(x), y)
                optimizer.zero_grad()
                (loss + attachment.penalty()).backward()
                optimizer.step()
        return torch.tensor(attachment.step_count)

    rounds = (3, 5, 4)
    alone, together = ([make(kind) for _ in rounds] for _ in range(2))
    for model, n in zip(alone, rounds, strict=True):
        train(model, n)
    counts = in_threads([lambda m=m, n=n: train(m, n) for m, n in zip(together, rounds, strict=True)])
    assert [int(count) for count in counts] == [n * len(batches) for n in rounds]
    for one, other in zip(alone, together, strict=True):
        assert_equal_weights(one, other)


@pytest.mark.works_with("Threads")
def test_a_model_that_several_threads_run_at_once_misses_no_call(batches):
    """As actors do that share a policy."""
    cell = make(nn.GRUCell, 3, 4)
    attachment = regkit.attach(cell, {"rules": [{"penalty": "activity_l2(1, reduction=sum)"}]})

    def run(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        h, total = None, torch.zeros(())
        for _ in range(150):
            h = cell(torch.randn(2, 3, generator=generator, dtype=torch.float64), h)
            total = total + h.square().sum()
        return total

    totals = in_threads([lambda seed=seed: run(seed) for seed in range(6)])
    penalty = attachment.penalty()
    torch.testing.assert_close(penalty, sum(totals))
    ours, theirs = (
        torch.autograd.grad(one, list(cell.parameters()), retain_graph=True) for one in (penalty, sum(totals))
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.works_with("Threads")
def test_lengths_of_one_thread_are_not_taken_for_those_of_another(batches):
    model = make(Sequenced)
    attachment = regkit.attach(model, AR_TAR)
    x = batches[0][0]

    def elsewhere() -> Tensor:
        return model(x)

    def elsewhere_with_lengths() -> Tensor:
        with attachment.lengths([1] * 6):
            return model(x)

    with attachment.lengths([5, 4, 3, 2, 1, 5]):
        for call in (elsewhere, elsewhere_with_lengths):
            with pytest.raises(regkit.StepError, match=r"lengths\(\) or mask\(\) were entered in one thread"):
                in_threads([call])
        with torch.no_grad():
            model(x)
        model(x)
    penalty = attachment.penalty()
    with attachment.lengths([5, 4, 3, 2, 1, 5]):
        model(x)
    torch.testing.assert_close(attachment.penalty(), penalty)
