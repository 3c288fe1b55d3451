"""What steps cost beside an earlier version: both in turns, each time in a fresh process."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Final

from tests.benchmarks.bars import Bar

ROOT = Path(__file__).parents[2]
WORKLOADS: Final = ("a", "b", "c", "d1", "d2", "f")

_WEIGHTS: Final = ("L2: regkit", "L1: regkit", "max-norm, every row violates: regkit")
_OUTPUTS: Final = ("AR: regkit", "AR and TAR: regkit")


@dataclass(frozen=True)
class Claim:
    """What a version may cost beside another. figure: `own` work, or the whole `step` as a multiple of the bare one."""

    says: str
    workloads: tuple[str, ...]
    ways: tuple[str, ...]
    figure: str
    limit: float


CLAIMS: Final = (
    Claim("Activity of many small layers costs less than half.", ("d1",), _OUTPUTS, "own", 0.45),
    Claim("Activity of a cell that is called in a loop costs a third less.", ("f",), _OUTPUTS, "own", 0.65),
    Claim("Activity of one LSTM costs less.", ("a",), _OUTPUTS, "own", 0.85),
    Claim("Penalties and constraints on weights are not dearer.", WORKLOADS, _WEIGHTS, "own", 1.1),
    Claim("Steps with large weights are as fast as before.", ("b", "c"), (*_WEIGHTS, *_OUTPUTS), "step", 1.05),
)  # fmt: skip
"""The bars; what they speak of is what is measured."""

Figures = dict[str, dict[str, dict[str, list[list[float]]]]]
"""By workload, way and figure: the medians of the earlier version's processes, and those of this one's."""


def ways_on(workload: str) -> list[str]:
    """The ways that are measured on a workload."""
    return list(dict.fromkeys(way for claim in CLAIMS if workload in claim.workloads for way in claim.ways))


def lay_out(revision: str, folder: Path) -> None:
    """Put a revision's code there. Raises CalledProcessError where git does not know the revision."""
    command = ["git", "archive", "--format=tar", revision, "regkit", "plugins"]
    packed = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")


def run_in(folder: Path, job: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Measure with the version that lies there. Raises RuntimeError where another one was imported."""
    path = os.pathsep.join(map(str, (folder, folder / "plugins", ROOT)))
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.inside", json.dumps(job)],
        cwd=folder, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    if strangers := [place for place in found["places"] if not Path(place).is_relative_to(folder)]:
        raise RuntimeError(f"measured {', '.join(strangers)}, which is not in {folder}")
    rows: dict[str, dict[str, float]] = found["rows"]
    return rows


def compare(revision: str, names: Sequence[str], processes: int, pace: dict[str, Any]) -> Figures:
    """Measure both versions on these workloads, one after the other and each first in turn."""
    figures: Figures = {
        name: {way: {figure: [[], []] for figure in ("own", "step")} for way in ways_on(name)} for name in names
    }
    with TemporaryDirectory() as folder:
        earlier = Path(folder).resolve()
        lay_out(revision, earlier)
        for turn in range(processes):
            for name in names:
                print(f"measuring: {name}, {turn + 1} of {processes}", file=sys.stderr, flush=True)
                for version in (0, 1) if turn % 2 == 0 else (1, 0):
                    job = {"workload": name, "ways": ways_on(name), **pace}
                    for way, row in run_in((earlier, ROOT)[version], job).items():
                        for figure, value in row.items():
                            figures[name][way][figure][version].append(value)
    return figures


def ratio(versions: Sequence[Sequence[float]], middle: Callable[[Sequence[float]], float] = median) -> float:
    """This version to the earlier one, by their median processes, or others."""
    earlier, this = map(middle, versions)
    return this / earlier


def table(figures: Figures, revision: str) -> str:
    """Each row's own work in both versions, the ratios of medians and minima, and the ratio of whole steps."""
    lines = [
        f"| | own work at {revision} | now | now / then | of minima | whole step, now / then |",
        f"|{' --- |' * 6}",
    ]
    for name, rows in figures.items():
        for way, row in rows.items():
            then, this = (f"{1e6 * median(one):.4g} µs" for one in row["own"])
            ratios = ratio(row["own"]), ratio(row["own"], min), ratio(row["step"])
            lines.append(f"| {name} {way} | {then} | {this} | {' | '.join(f'{one:.3f}' for one in ratios)} |")
    return "\n".join(lines)


def bars(figures: Figures) -> Iterator[tuple[Claim, Bar]]:
    """Every bar whose workload was measured, with what it is there for.

    Own work is judged by the fastest processes, as whatever else the machine does can only add to it; whole steps by
    the median ones, as that may as well have added to the bare steps that they are divided by.
    """
    for claim in CLAIMS:
        what, middle = {"own": ("own work", min), "step": ("whole step", median)}[claim.figure]
        for name in claim.workloads:
            for way in claim.ways if name in figures else ():
                value = ratio(figures[name][way][claim.figure], middle)
                yield claim, Bar(f"{way}, {what}, now / then", name, value, claim.limit)


def checked(figures: Figures) -> str:
    """Every bar under its sentence, and whether it holds."""
    lines: list[str] = []
    for claim, bar in bars(figures):
        if claim.says not in lines:
            lines.append(claim.says)
        lines.append(f"  {bar}")
    return "\n".join(lines)
