"""The benchmark: it times as it says, compares the same mathematics, and writes what it measures."""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regkit
from regkit.runtime import optimizer_hooks
from tests.benchmarks import by_hand, report
from tests.benchmarks import lab as lab_room
from tests.benchmarks.__main__ import RESULTS, main
from tests.benchmarks.bars import Bar
from tests.benchmarks.lab import Lab, Run
from tests.benchmarks.timing import Sample, beside, quartiles
from tests.benchmarks.ways import WAYS, Way, ways_of
from tests.benchmarks.workloads import Workload, workloads

# --- timing ----------------------------------------------------------------------------------------------------------


class Scripted:
    """A block of steps that takes what is written down, and says who was asked in what order."""

    def __init__(self, name: str, base: Scripted | None, seconds: Callable[[], float], asked: list[str]) -> None:
        self.name, self._base, self._seconds, self._asked = name, base, seconds, asked

    @property
    def base(self) -> Scripted:
        return self._base or self

    def block(self, steps: int) -> Sample:
        self._asked.append(self.name)
        return Sample(self._seconds(), 0.0, float(steps))


def test_each_block_of_steps_stands_between_two_of_its_base_so_that_a_drift_cancels():
    asked: list[str] = []
    clock = iter(range(1, 10**6))
    bare = Scripted("bare", None, lambda: float(next(clock)), asked)  # everything gets slower by 1 at each block
    other = Scripted("other", None, lambda: float(next(clock)), asked)
    ways = [
        Scripted(name, base, lambda: float(next(clock)), asked)
        for name, base in zip("xyz", (bare, bare, other), strict=True)
    ]
    found = beside(ways, 3, 0.0, 6)
    assert all(
        here.seconds == base.seconds and here.faults == 3 for samples in found.values() for here, base in samples
    )
    assert {len(samples) for samples in found.values()} == {6}
    for place, name in enumerate(asked):
        if name in "xyz":
            assert asked[place - 1] == asked[place + 1] == ("other" if name == "z" else "bare")
    assert len(asked) < 6 * 9  # neighbours share what is between them


def test_quartiles_are_the_median_and_those_on_either_side():
    assert quartiles([5.0, 1.0, 3.0, 2.0, 4.0]) == [3.0, 2.0, 4.0, 5]


@pytest.mark.parametrize(("most", "value", "passed"), [(True, 1.1, True), (True, 1.2, False), (False, 1.1, False)])
def test_a_bar_is_the_most_or_the_least(most: bool, value: float, passed: bool):
    bar = Bar("what", "a", value, 1.15, most)
    assert bar.passed is passed
    assert ("pass" if passed else "FAIL") in str(bar)


# --- the benchmark compares what it says -----------------------------------------------------------------------------


def tiny(name: str) -> Workload:
    return next(one for one in workloads(True) if one.name == name)


def gradients_of(run: Run) -> list[Tensor]:
    """What the gradients are when the optimizer reads them, which leaves them as they are."""
    seen: list[Tensor] = []
    handle = run.optimizer.register_step_post_hook(
        lambda *_: seen.extend(w.grad.clone() for w in run.weights if w.grad is not None)
    )
    with run.acting():
        run.step()
    handle.remove()
    return seen


SAME = [
    ("L2: regkit", "L2: loss term"),
    ("L2: regkit", "L2: loss term, one autograd Function"),
    ("L2: regkit", "L2: regkit, via the loss"),
    ("L1: regkit", "L1: loss term"),
    ("elastic net: regkit", "elastic net: loss term"),
    ("elastic net: regkit", "elastic net: regkit, L1 and L2 as two rules"),
    ("orthogonal: regkit", "orthogonal: loss term"),
    ("AR: regkit", "AR: loss term"),
    ("AR and TAR: regkit", "AR and TAR: loss term"),
]


def run_of(lab: Lab, name: str) -> Run:
    return Run(lab, next(way for way in WAYS if way.name == name))


def furthest(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max(float((one - other).abs().max()) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("workload", "ours", "theirs"),
    [(name, *pair) for name in ("a", "e", "f") for pair in SAME],
)
def test_penalties_that_are_compared_have_the_same_gradient(workload: str, ours: str, theirs: str):
    lab = Lab(tiny(workload))
    found = gradients_of(run_of(lab, ours))
    assert furthest(found, gradients_of(run_of(lab, theirs))) < 1e-7
    assert furthest(found, gradients_of(lab.base("Adam"))) > 1e-4


def weights_of(run: Run, steps: int = 1) -> list[Tensor]:
    """What the weights are after consecutive steps."""
    with run.acting():
        for _ in range(steps):
            run.step()
        return [w.detach().clone() for w in run.weights]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("max-norm, every row violates: regkit", "max-norm: renorm_ loop"),
        ("max-norm, every row violates: regkit", "max-norm: loop of norms"),
        ("max-norm, every row violates: regkit", "max-norm: Keras' formula"),
        ("unit-norm: regkit", "unit-norm: loop"),
        ("non-negative: regkit", "non-negative: Keras' formula"),
        ("A/A", "max-norm, nothing violates: regkit"),
    ],
)
def test_constraints_that_are_compared_lead_to_the_same_weights(ours: str, theirs: str):
    """Keras' own with its epsilon, of 1e-7 beside a norm."""
    lab = Lab(tiny("a"))
    found = weights_of(run_of(lab, ours))
    assert furthest(found, weights_of(run_of(lab, theirs))) < 1e-6
    if ours != "A/A":
        assert furthest(found, weights_of(lab.base("Adam"))) > 1e-2
        again = weights_of(run_of(lab, ours), steps=3)  # the weights were put back at each: all rows violate again
        assert furthest(found, again) < 1e-5


def test_every_row_violates_where_the_row_says_so_and_none_where_it_says_that():
    for workload in (workloads(False)[0], tiny("d2")):
        norms = torch.cat([w.norm(dim=1) for w in Lab(workload).matrices])
        assert float(norms.min()) > by_hand.BOUND


def test_after_its_block_nothing_of_a_way_is_left():
    lab = Lab(tiny("a"))
    bare = lab.base("Adam")
    alone = bare.counted().operations
    for way in ways_of(lab.workload):
        Run(lab, way).block(1)
        assert bare.counted().operations == alone
        assert not optimizer_hooks._handles
        assert all(group["weight_decay"] == 0 for group in bare.optimizer.param_groups)


def test_within_a_block_a_document_is_attached_once_and_hears_every_step(monkeypatch: pytest.MonkeyPatch):
    made: list[regkit.Attachment] = []
    attach = regkit.attach

    def seen(*given: Any) -> regkit.Attachment:
        made.append(attach(*given))
        return made[-1]

    monkeypatch.setattr(regkit, "attach", seen)
    run_of(Lab(tiny("a")), "L2: regkit").block(5)
    assert [one.step_count for one in made] == [2 + 5]


def test_the_time_in_which_weights_are_put_back_is_taken_off(monkeypatch: pytest.MonkeyPatch):
    lab, hour = Lab(tiny("a")), [0]
    copy = torch._foreach_copy_

    def slow(*given: Any) -> None:
        copy(*given)
        hour[0] += 3600

    monkeypatch.setattr(lab_room, "now", lambda: hour[0])
    monkeypatch.setattr(torch, "_foreach_copy_", slow)
    assert lab.base("Adam").block(3).seconds == 0
    assert hour[0] == (1 + 2 + 3) * 3600
    assert run_of(lab, "max-norm: renorm_ loop").alone(3) == 0


def test_a_block_tells_of_the_pages_that_are_mapped_in_it():
    kept = []

    def map_memory(weights: Sequence[nn.Parameter]) -> None:
        kept.append(mmap.mmap(-1, 64 * mmap.PAGESIZE))
        for page in range(64):
            kept[-1][page * mmap.PAGESIZE] = 1

    assert Run(Lab(tiny("a")), Way("maps", loop=map_memory)).block(3).faults >= 64
    assert len(kept) == 2 + 3


# --- the benchmark runs ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_benchmark_runs_writes_what_it_says_and_every_row_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["--tiny", "--only", "a,d2,e,f,layers,sizes", "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert (tmp_path / "costs.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert printed.strip() == (tmp_path / "table.md").read_text(encoding="utf-8").strip()
    for workload in (one for one in workloads(True) if one.name in results["workloads"]):
        rows = results["workloads"][workload.name]["rows"]
        assert list(rows) == [way.name for way in ways_of(workload)]
        for way in ways_of(workload):
            row = rows[way.name]
            assert ("share" in row) == (way.calls is None)
            assert ("floors" in row) == (way.floor is not None)
            for field in set(row) - {"operations", "allocated"}:
                median, low, high, number = row[field]
                assert low <= median <= high
                assert number >= 2
    assert {way.name for way in WAYS} - {"orthogonal: geotorch"} <= {
        row for one in results["workloads"].values() for row in one["rows"]
    }
    width = len(results["workloads"]) + 1
    assert all(line.count("|") == width + 1 for line in report.table(results).splitlines())
    assert main(["--results", str(tmp_path / "results.json")]) == 0
    assert capsys.readouterr().out == printed


def test_the_first_step_is_measured_and_has_a_bar(capsys: pytest.CaptureFixture[str]):
    main(["--tiny", "--only", "first", "--check"])
    told = capsys.readouterr().out
    assert "The first step: 20 rules" in told
    assert "the first step of 40 rules / of 20" in told


def test_the_benchmark_compares_with_keras(capsys: pytest.CaptureFixture[str]):
    main(["--tiny", "--only", "keras", "--check"])
    assert re.search(r"Keras' regularized step / the same with regkit: [\d.]+, at least 2", capsys.readouterr().out)


def test_what_cannot_be_told_from_nothing_is_shown_as_noise_and_mapped_memory_beside_the_times():
    rows = {
        "noise": {"share": [0.001, -0.002, 0.004, 9], "faults": [0.2, -3.0, 4.0, 9], "operations": 0},
        "cost": {"share": [0.021, 0.019, 0.022, 9], "floors": [1.0834, 1.0, 1.1, 9], "operations": 2},
        "memory": {"share": [0.21, 0.19, 0.22, 9], "faults": [812.4, 800.0, 820.0, 9], "operations": 9},
    }
    bare = {"bare": {"Adam": [0.0055, 0.005, 0.006, 9]}, "faults": {"Adam": [17.0, 17.0, 18.0, 9]}}
    assert report.table({"workloads": {"a": {**bare, "rows": rows}}}).splitlines() == [
        "| | a |",
        "| --- | --- |",
        "| bare step | 5.5 ms / 17 faults |",
        "| noise | ±0.30 % / 0 |",
        "| cost | 2.1 % / 1.08 / 2 |",
        "| memory | 21 % / 9 / 812 faults |",
    ]


def test_the_table_is_put_between_its_marks_and_nowhere_else(tmp_path: Path):
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.START}\nold\n{report.END}\nafter\n", encoding="utf-8")
    report.put_into(page, results)
    wanted = f"before\n{report.START}\n{report.page(results)}\n{report.END}\nafter\n"
    assert page.read_text(encoding="utf-8") == wanted
    page.write_text("no marks", encoding="utf-8")
    with pytest.raises(ValueError, match="0 times, not once"):
        report.put_into(page, results)


def test_a_part_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["--only", "z"])
    assert "unknown: z; there are a, b" in capsys.readouterr().err
