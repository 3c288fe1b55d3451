"""Tables, JSON, and the part of docs/costs.md that is made of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from tests.benchmarks.bars import bars

Results = dict[str, Any]

START, END = "<!-- costs: python -m tests.benchmarks --publish -->", "<!-- end of costs -->"

SHOWN: Final = (
    "A/A",
    "L2: regkit",
    "L2: loss term",
    "L2: loss term, one autograd Function",
    "L2: weight_decay, single",
    "L2: weight_decay, foreach",
    "L2: weight_decay, fused",
    "L1: regkit",
    "L1: loss term",
    "elastic net: regkit",
    "elastic net: loss term",
    "orthogonal: regkit",
    "orthogonal: loss term",
    "max-norm, nothing violates: regkit",
    "max-norm, every row violates: regkit",
    "max-norm: renorm_ loop",
    "max-norm: loop of norms",
    "max-norm: Keras' formula",
    "max-norm: parametrization",
    "orthogonal: torch's parametrization",
    "non-negative: regkit",
    "non-negative: Keras' formula",
    "AR: regkit",
    "AR: loss term",
    "AR and TAR: regkit",
    "AR and TAR: loss term",
)
"""The rows of the page's tables."""


_WORK: Final = "The work that is added: its multiple of the floor / the number of operations."


def table(results: Results) -> str:
    """Each way by workload: share of the bare step / multiple of the floor / operations / page faults added."""
    workloads = results["workloads"]
    names = list(dict.fromkeys(row for one in workloads.values() for row in one["rows"]))
    bare = f"| bare step | {' | '.join(map(_bare, workloads.values()))} |"
    return "\n".join([*_head(workloads), bare, *_rows(workloads, names, _cell)])


def _head(workloads: Results) -> list[str]:
    return [f"| | {' | '.join(workloads)} |", f"|{' --- |' * (len(workloads) + 1)}"]


def _rows(workloads: Results, names: Sequence[str], cell: Callable[[Results], str]) -> list[str]:
    """A line for each way that something was measured of; empty where a workload has none."""
    found = {name: [one["rows"].get(name) for one in workloads.values()] for name in names}
    told = {name: ["" if row is None else cell(row) for row in rows] for name, rows in found.items()}
    return [f"| {name} | {' | '.join(cells)} |" for name, cells in told.items() if any(cells)]


def shares(results: Results) -> str:
    """What each way adds to the bare step, as a share of that."""
    workloads = results["workloads"]
    bare = [_milliseconds(one["bare"]["Adam"][0]) for one in workloads.values()]
    return "\n".join([*_head(workloads), f"| bare step | {' | '.join(bare)} |", *_rows(workloads, SHOWN, _share)])


def work(results: Results) -> str:
    """The work that each way adds: multiple of the floor / operations / page faults."""
    workloads = results["workloads"]
    return "\n".join([*_head(workloads), *_rows(workloads, [name for name in SHOWN if name != "A/A"], _work)])


def _bare(workload: Results) -> str:
    return _milliseconds(workload["bare"]["Adam"][0]) + _faults(workload.get("faults", {}).get("Adam"))


def _faults(faults: Sequence[float] | None) -> str:
    """The median, where they were counted and it is one in a step at least."""
    return f" / {faults[0]:.0f} faults" if faults is not None and abs(faults[0]) >= 1 else ""


def _cell(row: Results) -> str:
    return " / ".join(part for part in (_share(row), _work(row)) if part)


def _share(row: Results) -> str:
    return _percent(row["share"]) if "share" in row else ""


def _work(row: Results) -> str:
    floors = f"{row['floors'][0]:.3g} / " if "floors" in row else ""
    return f"{floors}{row['operations']}{_faults(row.get('faults'))}"


def _percent(share: Sequence[float]) -> str:
    """The median, or half the distance of the quartiles where there is a zero between them."""
    median, low, high = (100 * one for one in share[:3])
    return f"±{_digits((high - low) / 2)} %" if low < 0 < high else f"{_digits(median)} %"


def _digits(number: float) -> str:
    return f"{number:.2f}" if abs(number) < 1 else f"{number:.1f}" if abs(number) < 10 else f"{number:.0f}"


def _milliseconds(seconds: float) -> str:
    return f"{float(f'{1000 * seconds:.3g}'):g} ms"


def conditions(results: Results) -> str:
    """Where and when it was measured."""
    about = results["conditions"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return f"{about['processor']}, {about['cores']} cores, {about['system']}; one thread; {versions}; {about['date']}."


def titles(results: Results) -> str:
    """What the columns are."""
    return "; ".join(f"**{name}** {one['title']}" for name, one in results["workloads"].items()) + "."


def keras(results: Results) -> str:
    """What Keras' step and regkit's take; nothing where that was not measured."""
    if "keras" not in results:
        return ""
    found = results["keras"]
    steps = ", ".join(f"{name} {_milliseconds(taken[0])}" for name, taken in found["steps"].items())
    return f"A whole step with L2, max-norm and activity L2 ({found['title']}): {steps}."


def first_step(results: Results) -> str:
    """What a first step takes; nothing where that was not measured."""
    taken = ", ".join(f"{count} rules {_milliseconds(one)}" for count, one in results.get("first step", {}).items())
    return f"The first step: {taken}." if taken else ""


def page(results: Results) -> str:
    """The text between the marks in docs/costs.md."""
    parts = [
        shares(results),
        titles(results),
        _WORK,
        work(results),
        keras(results),
        f"Measured on: {conditions(results)}",
    ]
    return "\n\n".join(part for part in parts if part)


def put_into(path: Path, results: Results) -> None:
    """Write it there. Raises ValueError where the marks are missing."""
    text = path.read_text(encoding="utf-8")
    pattern = rf"{re.escape(START)}\n.*?{re.escape(END)}"
    new, times = re.subn(pattern, lambda _: f"{START}\n{page(results)}\n{END}", text, flags=re.DOTALL)
    if times != 1:
        raise ValueError(f"{path} has {START!r} … {END!r} {times} times, not once")
    path.write_text(new, encoding="utf-8")


def full(results: Results) -> str:
    """All of it, as Markdown."""
    parts = [table(results), titles(results), first_step(results), keras(results)]
    for of, curve in results.get("curves", {}).items():
        rows = list(next(iter(curve.values()))["rows"])
        lines = [f"| {of} | bare step | {' | '.join(rows)} |", f"|{' --- |' * (len(rows) + 2)}"]
        for size, one in curve.items():
            cells = " | ".join(_cell(one["rows"][row]) for row in rows)
            lines.append(f"| {size} | {_bare(one)} | {cells} |")
        parts.append("\n".join(lines))
    parts += [
        "Cells: share of the bare step / multiple of the floor / operations / page faults added.",
        conditions(results),
    ]
    return "\n\n".join(part for part in parts if part)


def checked(results: Results) -> str:
    """Every bar, and whether it holds."""
    found = bars(results)
    return "\n".join([*map(str, found), f"{sum(one.passed for one in found)} of {len(found)} bars hold"])


def to_json(results: Results) -> str:
    """With each list of numbers on one line."""
    text = json.dumps(results, indent=1, ensure_ascii=False)
    return re.sub(r"\[\s+([^\[\]{}]+?)\s+\]", lambda m: "[" + re.sub(r"\s+", " ", m[1]) + "]", text) + "\n"
