"""What is shown costs nothing until it is asked for, and trainers ask where they write it down and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

import regkit
from regkit import Penalty
from regkit.integrations.lightning import RegularizationCallback as LightningCallback
from regkit.integrations.skorch import RegularizationCallback as SkorchCallback
from regkit.integrations.transformers import RegularizedTrainer
from tests.support.counting import Counted
from tests.support.every_rule import ON_ACTIVITY, ON_WEIGHTS, Document, attached
from tests.support.laws import PENS
from tests.support.loops import Batches
from tests.support.trainers.lightning_runs import SILENCED, Automatic, fit
from tests.support.trainers.skorch_nets import RULES, Net, Reader, generated, made
from tests.support.trainers.text_trainer import make_text_model, trained

# --- in a loop -------------------------------------------------------------------------------------------------------

SELF_SUFFICIENT = {case.kind.kind for case in PENS if type(case.kind).gradient is not Penalty.gradient}
"""The penalties that know their gradient, and need no value for it."""

SILENT = {
    name: rules
    for name, rules in ON_WEIGHTS.items()
    if all("constraint" in rule or rule["penalty"]["kind"] in SELF_SUFFICIENT for rule in rules)
    and "via loss" not in name
}


def train(model: nn.Module, attachment: regkit.Attachment, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(torch.randn(5, 2, 3))[0].square().mean() + attachment.penalty()).backward()
        optimizer.step()


@pytest.mark.parametrize("rules", SILENT.values(), ids=SILENT)
def test_steps_compute_no_value_and_no_violation(rules: Document, monkeypatch: pytest.MonkeyPatch):
    model = nn.LSTM(3, 4)
    attachment = attached(model, rules)
    computed: list[str] = []
    for kind in {type(binding.kind) for binding in attachment.plan.bindings}:
        for name in {"value", "values", "violation"} & set(dir(kind)):
            monkeypatch.setattr(kind, name, noting(getattr(kind, name), computed))
    train(model, attachment, 3)
    assert computed == []
    attachment.values()
    attachment.violations()
    assert len(computed) >= len(rules)


def noting(method: Any, computed: list[str]) -> Any:
    def noted(*args: Any) -> Any:
        computed.append(method.__name__)
        return method(*args)

    return noted


@pytest.mark.parametrize("rules", ON_ACTIVITY.values(), ids=ON_ACTIVITY)
def test_the_values_of_activity_are_those_that_the_loss_had_and_nothing_is_computed_anew(rules: Document):
    model = nn.LSTM(3, 4)
    attachment = attached(model, rules)
    train(model, attachment, 1)
    with Counted() as seen:
        values = attachment.values()
    assert len(values) == len(rules)
    assert seen.largest <= 8  # bytes: nothing but single numbers
    assert all(bool(value > 0) for value in values.values())


# --- in trainers -----------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What was asked of an attachment to show, and after how many steps."""
    found: list[tuple[str, int]] = []

    def asking(name: str) -> Any:
        method = getattr(regkit.Attachment, name)

        def noted(attachment: regkit.Attachment) -> dict[str, Tensor]:
            found.append((name, attachment.step_count))
            return method(attachment)

        return noted

    for name in ("values", "violations"):
        monkeypatch.setattr(regkit.Attachment, name, asking(name))
    return found


def each(*steps: int) -> list[tuple[str, int]]:
    """Both, after each of these steps."""
    return [(name, step) for step in steps for name in ("values", "violations")]


class TestLightning:
    pytestmark = SILENCED

    @pytest.mark.parametrize("accumulated", [1, 3])
    def test_asks_once_in_so_many_steps_however_many_batches_they_take(
        self, accumulated: int, make_model: Any, batches: Batches, tmp_path: Path, asked: list[tuple[str, int]]
    ):
        run = fit(
            Automatic(make_model()),
            [*batches, *batches, *batches] * accumulated,
            callbacks=[LightningCallback(RULES)],
            logger=CSVLogger(tmp_path),
            log_every_n_steps=5,
            accumulate_grad_batches=accumulated,
        )
        assert run.global_step == 12
        assert asked == each(5, 10)


class TestSkorch:
    def test_asks_once_in_an_epoch(self, asked: list[tuple[str, int]]):
        made(Reader, Net, callbacks=[SkorchCallback(RULES)]).fit(*generated())
        assert asked == each(4, 8)


class TestTransformers:
    def test_asks_where_it_logs_and_not_in_evaluation_or_at_the_end(self, tmp_path: Path, asked: list[tuple[str, int]]):
        trained(
            make_text_model(),
            tmp_path,
            RegularizedTrainer,
            spec={"rules": [{"penalty": "activity_l2(1)"}, {"constraint": "max_norm(2)"}]},
            logging_strategy="steps",
            logging_steps=5,
        )
        assert asked == each(5)
