"""From a workload to its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any

from tests.benchmarks.lab import Floors, Lab, Run, timed
from tests.benchmarks.timing import Sample, beside, in_turns, quartiles
from tests.benchmarks.ways import Way
from tests.benchmarks.workloads import Workload
from tests.support.counting import Counted

Results = dict[str, Any]


def measure(workload: Workload, ways: Sequence[Way], seconds: float, fewest: int) -> Results:
    """Times, shares, multiples and counts of each way, in so many seconds but in so many rounds at least.

    bytes: of the weights. bare: seconds of the bare step of each optimizer; faults: the pages that are mapped in it.
    floors: seconds. rows: for each way `step`, the seconds that it adds to a step; `share` of the bare step; `faults`
    that it adds; `alone`, the seconds of its work alone; `floors`, how many times its floor that is; `operations` and
    `allocated` bytes that it adds to a step.
    """
    lab = Lab(workload)
    runs = [Run(lab, way) for way in ways]
    bare = {kind: lab.base(kind).counted() for kind in {run.way.optimizer: None for run in runs}}
    counts = {run.name: _added_counts(run, bare[run.way.optimizer]) for run in runs}
    stepping = [run for run in runs if run.way.calls is None]
    pairs = beside(stepping, workload.steps, seconds * 0.65, fewest)
    alone, floors = _alone(lab, runs, seconds * 0.35, fewest)
    bases: dict[str, list[Sample]] = {kind: [] for kind in bare}
    for run in stepping:
        bases[run.way.optimizer] += [base for _, base in pairs[run.name]]
    return {
        "title": workload.title,
        "bytes": sum(w.nbytes for w in lab.weights),
        "steps": workload.steps,
        "bare": {kind: quartiles([one.seconds for one in samples]) for kind, samples in bases.items()},
        "faults": {kind: quartiles([one.faults for one in samples]) for kind, samples in bases.items()},
        "floors": {name: quartiles(samples) for name, samples in floors.items()},
        "rows": {
            run.name: {
                **_added(run.way, pairs.get(run.name, [])),
                **_multiples(run.way, alone.get(run.name, []), floors),
                **counts[run.name],
            }
            for run in runs
        },
    }


def _added_counts(run: Run, bare: Counted) -> Results:
    """Where its work was done apart from a step, there is nothing else in what is counted."""
    with_it = run.counted()
    less = Counted() if run.apart else bare
    return {"operations": with_it.operations - less.operations, "allocated": with_it.allocated - less.allocated}


def _alone(
    lab: Lab, runs: Sequence[Run], seconds: float, fewest: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """The seconds of each way's work alone, and of the floors, taken in turns; of ways that add nothing, none."""
    flat = lab.make_gradients()
    working = [run for run in runs if run.way.works_alone and (run.apart or not run.way.outputs)]
    bare = lab.base("Adam")
    calls = max(1, min(8, 4_000_000 // sum(w.nbytes for w in lab.weights)))
    floors = Floors(lab, flat).all()
    turns = {run.name: partial(run.alone, run.way.calls or calls) for run in working}
    samples = in_turns(
        {
            **turns,
            "bare": partial(bare.alone, calls),
            **{f"floor: {name}": partial(timed, lab, call, calls) for name, call in floors.items()},
        },
        seconds,
        fewest,
    )
    # The step of an optimizer that does nothing takes its time, too: torch's own, a few microseconds.
    nothing = median(samples["bare"])
    alone = {
        run.name: [one if run.way.decay or run.way.outputs else one - nothing for one in samples[run.name]]
        for run in working
    }
    return alone, {name: samples[f"floor: {name}"] for name in floors}


def _added(way: Way, pairs: Sequence[tuple[Sample, Sample]]) -> Results:
    """What it adds to a step; where that is at the step, it is looked for there alone."""
    if not pairs:
        return {}
    part = 1 if way.at_step else 0
    return {
        "step": quartiles([here[part] - base[part] for here, base in pairs]),
        "share": quartiles([(here[part] - base[part]) / base.seconds for here, base in pairs]),
        "faults": quartiles([here.faults - base.faults for here, base in pairs]),
    }


def _multiples(way: Way, alone: Sequence[float], floors: dict[str, list[float]]) -> Results:
    if not alone:
        return {}
    found: Results = {"alone": quartiles(alone)}
    if way.floor is not None:
        floor = floors[f"{way.floor}, matrices" if way.matrices else way.floor]
        found["floors"] = quartiles([one / lowest for one, lowest in zip(alone, floor, strict=True)])
    return found
