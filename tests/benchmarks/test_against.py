"""A version beside an earlier one: each in processes of its own, and only what regkit does is counted."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import regkit
from tests.benchmarks import against, inside
from tests.benchmarks import lab as lab_room
from tests.benchmarks.__main__ import main
from tests.benchmarks.against import CLAIMS, WORKLOADS, compare, lay_out, run_in, ways_on
from tests.benchmarks.inside import Watched, measured, nodes
from tests.benchmarks.lab import Lab
from tests.benchmarks.ways import WAYS
from tests.benchmarks.workloads import workloads

AR = next(way for way in WAYS if way.name == "AR: regkit")

# --- what is counted -------------------------------------------------------------------------------------------------


class Clock:
    """Time goes on only where it is told to."""

    def __init__(self) -> None:
        self.now = 0

    def spending(self, time: int) -> Any:
        """A hook that takes so long."""

        def spend(*_: Any) -> None:
            self.now += time

        return spend


class SumThatTakesTime(torch.autograd.Function):
    """A penalty whose gradient takes a time of its own."""

    @staticmethod
    def forward(ctx: Any, clock: Clock, *outputs: Tensor) -> Tensor:
        ctx.clock = clock
        ctx.save_for_backward(*outputs)
        return torch.stack(outputs).sum()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        ctx.clock.now += 10_000
        return None, *(slope.expand_as(one) for one in ctx.saved_tensors)


class Pretended:
    """An attachment of which every part takes a time of its own."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._outputs = clock, []

    def heard(self, module: nn.Module, given: Any, output: Tensor) -> None:
        self._clock.now += 100
        self._outputs.append(output)

    def penalty(self) -> Tensor:
        self._clock.now += 1000
        outputs, self._outputs = self._outputs, []
        return SumThatTakesTime.apply(self._clock, *outputs)


def test_all_that_an_attachment_does_is_timed_and_nothing_else(monkeypatch: pytest.MonkeyPatch):
    clock = Clock()

    @contextmanager
    def attach(net: nn.Module, document: Any) -> Iterator[Pretended]:
        attachment = Pretended(clock)
        with ExitStack() as stack:
            stack.callback(register_optimizer_step_pre_hook(clock.spending(1)).remove)
            stack.callback(register_optimizer_step_post_hook(clock.spending(10)).remove)
            stack.callback(net.layers[0].cell.register_forward_hook(attachment.heard).remove)
            yield attachment

    monkeypatch.setattr(regkit, "attach", attach)
    for room in (inside, lab_room):
        monkeypatch.setattr(room, "now", lambda: clock.now)
    run = Watched(Lab(next(one for one in workloads(True) if one.name == "f")), AR)
    run.net.layers[0].cell.register_forward_pre_hook(clock.spending(10**6))
    run.optimizer.register_step_pre_hook(clock.spending(10**6))
    run.optimizer.register_step_post_hook(clock.spending(10**6))
    sample = run.block(2)
    calls = len(run.lab.x)
    timed = (1 + 10 + calls * 100 + 1000 + 10_000) * 1e-9
    assert run.inside == pytest.approx([timed] * 4)
    assert sample.seconds == pytest.approx(timed + (calls + 2) * 1e-3)


def test_the_gradient_of_a_penalty_is_timed_as_far_as_the_outputs_and_not_along_the_recurrence():
    cell, state, outputs = nn.GRUCell(2, 2), None, []
    for _ in range(3):
        state = cell(torch.ones(1, 2), state)
        outputs.append(state)
    term = torch.stack(outputs).square().sum()
    assert sorted(node.name() for node in nodes(term, outputs)) == ["PowBackward0", "StackBackward0", "SumBackward0"]


@pytest.mark.parametrize("workload", ["a", "f"])
def test_what_is_measured_of_a_version_is_its_own_work_and_its_whole_step(workload: str):
    found = measured(workload, ways_on(workload), 0.0, tiny=True, shorter=1)
    assert set(found) == set(ways_on(workload))
    assert all(row["own"] > 0 and row["step"] > 0 for row in found.values())


# --- two versions ----------------------------------------------------------------------------------------------------

in_a_clone = pytest.mark.skipif(not (against.ROOT / ".git").exists(), reason="there is no history to compare with")


@in_a_clone
def test_an_earlier_version_is_laid_out_as_git_has_it(tmp_path: Path):
    lay_out("HEAD", tmp_path)
    kept = subprocess.run(
        ["git", "show", "HEAD:regkit/__init__.py"], cwd=against.ROOT, stdout=subprocess.PIPE, check=True
    ).stdout
    assert (tmp_path / "regkit/__init__.py").read_bytes() == kept
    assert {one.name for one in tmp_path.iterdir()} == {"regkit", "plugins"}
    with pytest.raises(subprocess.CalledProcessError):
        lay_out("no-such-revision", tmp_path)


def test_versions_take_turns_in_being_first_and_are_not_mixed_up(monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []

    def run(folder: Path, job: dict[str, Any]) -> dict[str, dict[str, float]]:
        asked.append("this" if folder == against.ROOT else "earlier")
        own = 1.0 if folder == against.ROOT else 4.0
        return {way: {"own": own + len(asked), "step": 1.0} for way in job["ways"]}

    monkeypatch.setattr(against, "lay_out", lambda revision, folder: None)
    monkeypatch.setattr(against, "run_in", run)
    figures = compare("REV", ["f"], 2, {})
    assert asked == ["earlier", "this", "this", "earlier"]
    assert list(figures["f"]) == ways_on("f")
    assert figures["f"]["AR: regkit"]["own"] == [[4 + 1, 4 + 4], [1 + 2, 1 + 3]]


@pytest.mark.slow
def test_what_was_imported_from_elsewhere_is_not_taken_for_a_version(tmp_path: Path):
    job = {"workload": "a", "ways": ["L2: regkit"], "seconds": 0.0, "tiny": True, "shorter": 1}
    with pytest.raises(RuntimeError, match="which is not in"):
        run_in(tmp_path, job)


@pytest.mark.slow
@in_a_clone
def test_this_version_is_measured_beside_another(capsys: pytest.CaptureFixture[str]):
    assert main(["--against", "HEAD", "--tiny", "--only", "f"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[2:]] == [f"| f {way.split(':')[0]}" for way in ways_on("f")]
    assert all(float(cell) > 0 for line in lines[2:] for cell in line.strip("| ").split(" | ")[3:])


# --- bars ------------------------------------------------------------------------------------------------------------


def figures(own: float, step: float) -> against.Figures:
    """Those of all workloads, where this version takes so many times the earlier one, in what bars are judged by."""
    by_minima, by_medians = [[9.0, 2.0, 1.0], [9.0, own, 5.0]], [[9.0, 2.0, 1.0], [2 * step, 0.5, 9.0]]
    return {name: {way: {"own": by_minima, "step": by_medians} for way in ways_on(name)} for name in WORKLOADS}


@pytest.mark.parametrize(
    ("own", "step", "failing"),
    [(0.44, 1.04, 0), (0.46, 1.04, 2), (0.66, 1.04, 4), (0.86, 1.04, 6), (1.11, 1.04, 6 + 18), (0.44, 1.06, 10)],
)
def test_each_bar_holds_up_to_its_limit(own: float, step: float, failing: int):
    found = [bar for _, bar in against.bars(figures(own, step))]
    assert len(found) == 6 + 18 + 10
    assert sum(not bar.passed for bar in found) == failing
    assert against.checked(figures(own, step)).count("FAIL") == failing


def test_each_sentence_stands_once_above_its_bars():
    lines = against.checked(figures(1.0, 1.0)).splitlines()
    assert [line for line in lines if not line.startswith("  ")] == [claim.says for claim in CLAIMS]


def test_the_table_shows_the_ratio_of_medians_and_that_of_minima():
    assert against.table({"f": figures(0.75, 1.0)["f"]}, "v1").splitlines()[2] == (
        "| f AR: regkit | 2e+06 µs | 5e+06 µs | 2.500 | 0.750 | 1.000 |"
    )


@pytest.mark.parametrize(("own", "status"), [(0.4, 0), (2.0, 1)])
def test_a_bar_that_does_not_hold_is_the_status_of_the_command(
    own: float, status: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(against, "compare", lambda *_: figures(own, 1.0))
    assert main(["--against", "REV", "--check"]) == status


@pytest.mark.parametrize(
    ("more", "says"), [(["--only", "e"], "unknown: e; there are a, b"), (["--publish"], "writes and reads nothing")]
)
def test_what_cannot_be_measured_beside_a_version_is_refused(
    more: list[str], says: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        main(["--against", "HEAD", *more])
    assert says in capsys.readouterr().err
