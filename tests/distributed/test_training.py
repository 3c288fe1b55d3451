"""In two and in four processes (gloo), training comes to the weights of one process on the whole batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.distributed.cases import ALL, BOUND, CASES, DOCUMENTS, STRENGTH, world
from tests.support.distributed.spreads import Spread, make_net, one_process
from tests.support.distributed.tasks import CONVERTED, converted
from tests.support.distributed.workers import LR, Case, Outcome, assert_same, batches, loss_of, run_alone, together
from tests.support.versions import needs_torch

pytestmark = pytest.mark.slow

TOLERANCE = 1e-9


def every_case() -> Iterator[object]:
    """Each case in each world that it is for, under the row that it proves."""
    for row, cases in CASES.items():
        for name, case in cases.items():
            for size in case.sizes:
                identity = f"{row}: {name}, {size} processes"
                marks = [pytest.mark.works_with(row), *([pytest.mark.slow] if size > 2 else [])]
                if identity.startswith("FSDP2: clipped"):
                    marks.append(needs_torch("2.13", "the norm of sharded gradients is wrong in the eighth digit"))
                yield pytest.param(f"{row}: {name}", case, size, id=identity, marks=marks)


def train_plainly(spread: Spread, optimizer: torch.optim.Optimizer) -> None:
    for x, y in batches():
        optimizer.zero_grad()
        loss_of(spread, x, y).backward()
        optimizer.step()


def weights(outcome: Outcome) -> Outcome:
    return {name: tensor for name, tensor in outcome.items() if " of " not in name}


@pytest.mark.parametrize(("task", "case", "size"), list(every_case()))
def test_many_processes_train_to_the_weights_of_one(task: str, case: Case, size: int):
    found = together(world(size).found(task))
    assert_same(found, run_alone(case), TOLERANCE)


@pytest.mark.parametrize("document", [*DOCUMENTS, "all"])
def test_every_document_that_is_compared_trains_to_weights_of_its_own(document):
    nothing = [{"penalty": "l2(1e-12)"}]
    without, within = (
        weights(run_alone(Case(one_process, rules))) for rules in (nothing, {**DOCUMENTS, "all": ALL}[document])
    )
    assert max(float((without[name] - within[name]).abs().max()) for name in within) > 1e-3


@pytest.mark.parametrize("row", [pytest.param(row, marks=pytest.mark.works_with(row)) for row in ("DDP", "FSDP2")])
def test_l2_in_two_processes_equals_the_weight_decay_of_torch_in_one(row):
    net = make_net()
    spread = one_process(net)
    groups = [{"params": net.rnn.parameters(), "weight_decay": 2 * STRENGTH}, {"params": net.head.parameters()}]
    train_plainly(spread, torch.optim.SGD(groups, lr=LR, momentum=0.9))
    expected = {name: parameter.detach() for name, parameter in net.named_parameters()}
    assert_same(weights(together(world(2).found(f"{row}: L2"))), expected, TOLERANCE)


WHOLE_ROWS = ["FSDP2: max-norm", "FSDP2: max-norm, columns", "Tensor parallel: max-norm, columns"]


@pytest.mark.parametrize(
    "task", [pytest.param(task, marks=pytest.mark.works_with(task.partition(":")[0])) for task in WHOLE_ROWS]
)
def test_max_norm_bounds_the_whole_row_and_not_the_part_that_a_process_holds(task):
    found = together(world(2).found(task))
    norms = torch.cat([w.norm(dim=1) for name, w in found.items() if name.startswith("rnn.weight")])
    assert float(norms.max()) == pytest.approx(BOUND)
    assert float(found["violation of max-norm"]) <= TOLERANCE


@pytest.mark.works_with("FSDP2")
def test_constraints_applied_after_an_evaluation_are_in_the_shards():
    for found in world(2).found("constrained_after_evaluation"):
        assert float(found["at once"]) == pytest.approx(0.0, abs=TOLERANCE)
        assert float(found["afterwards"]) == pytest.approx(0.0, abs=TOLERANCE)


@pytest.mark.works_with("FSDP2")
def test_a_model_that_was_just_evaluated_is_attached_to_the_optimizer_of_its_shards():
    assert world(2).found("attached_after_evaluation") == [True, True]


@pytest.mark.works_with("torch.distributed.checkpoint")
def test_the_step_by_which_torch_makes_the_state_of_an_optimizer_is_none_of_ours():
    assert world(2).found("states_of_a_new_optimizer") == [(0, True)] * 2


@pytest.mark.works_with("FSDP2")
def test_a_penalty_under_bfloat16_computation_is_of_the_float32_weights():
    found = together(world(2).found("decayed_under_bfloat16"))
    net = make_net().float()
    optimizer = torch.optim.SGD(net.rnn.parameters(), lr=0.5, weight_decay=2 * STRENGTH)
    for _ in batches():
        for parameter in net.rnn.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert_same(found, {name: parameter.detach() for name, parameter in net.rnn.named_parameters()}, 1e-6)


@pytest.mark.works_with("FSDP2 of computed weights")
def test_l2_under_weight_norm_equals_the_weight_decay_of_torch_of_the_magnitudes():
    net = make_net(computed="weight_norm")
    spread = one_process(net)
    named = {name: parameter for name, parameter in net.named_parameters() if name.endswith("original0")}
    rest = [parameter for name, parameter in net.named_parameters() if name not in named]
    groups = [{"params": named.values(), "weight_decay": 2 * STRENGTH}, {"params": rest}]
    train_plainly(spread, torch.optim.SGD(groups, lr=LR, momentum=0.9))
    expected = {name: parameter.detach() for name, parameter in net.named_parameters()}
    assert_same(weights(together(world(2).found("FSDP2 of computed weights: weight_norm, L2"))), expected, TOLERANCE)


@pytest.mark.works_with("FSDP2 of computed weights")
def test_max_norm_under_weight_norm_bounds_the_magnitudes():
    found = together(world(2).found("FSDP2 of computed weights: weight_norm, max-norm"))
    magnitudes = torch.cat([g.flatten() for name, g in found.items() if name.endswith("original0")])
    assert float(magnitudes.max()) == pytest.approx(BOUND)
    assert float(magnitudes.min()) < BOUND - 0.01


def every_conversion() -> Iterator[object]:
    """Each spread over which a model is converted, under the row that it proves."""
    for name in CONVERTED:
        marks = [pytest.mark.works_with(name[0].upper() + name[1:])]
        if name == "FSDP2":
            marks.append(
                needs_torch("2.13", "what is converted after fully_shard is trained wrongly, without rules too")
            )
        yield pytest.param(name, marks=marks)


@pytest.mark.parametrize("spread", list(every_conversion()))
def test_a_model_may_be_converted_after_attach(spread):
    found = together(world(2).found(f"converted {spread}"))
    assert_same(found, converted(Path(), spread, alone=True), 1e-6)


@pytest.mark.works_with("torch.distributed.checkpoint")
@pytest.mark.parametrize("spread", ["DDP", "FSDP2", "tensor parallel"])
def test_a_run_resumed_from_a_distributed_checkpoint_equals_one_that_was_not_interrupted(spread):
    for count, found, expected in world(2).found(f"resumed {spread}"):
        assert count == 2
        assert_same(found, expected, 0.0)
