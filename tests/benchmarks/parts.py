"""All of it, one part after another."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.first_step import measure_first_step
from tests.benchmarks.measuring import measure
from tests.benchmarks.ways import GROWING, WAYS, ways_of
from tests.benchmarks.workloads import growing_layers, growing_sizes, workloads

Results = dict[str, Any]

PARTS = ("a", "b", "c", "d1", "d2", "e", "f", "layers", "sizes", "first", "keras")
"""The workloads by name, the growth curves, the first step, and Keras."""


def measure_all(parts: Sequence[str], pace: float, tiny: bool) -> Results:
    """Measure these parts. pace: what their times are multiplied by; tiny: in sizes that only show that it runs."""
    fewest, shorter = (3, 1) if pace >= 1 else (2, 2)
    results: Results = {"conditions": conditions(), "workloads": {}}
    for workload in workloads(tiny, shorter):
        if workload.name in parts:
            _say(workload.title)
            results["workloads"][workload.name] = measure(workload, ways_of(workload), pace * workload.seconds, fewest)
    curves = {"layers": ("GRU cells", growing_layers), "sizes": ("hidden size", growing_sizes)}
    ways = [way for way in WAYS if way.name in GROWING]
    for part, (of, growing) in curves.items():
        if part in parts:
            _say(f"growth with {of}")
            results.setdefault("curves", {})[of] = {
                str(size): measure(one, ways, pace * one.seconds, fewest) for size, one in growing(tiny).items()
            }
    if "first" in parts:
        _say("the first step")
        results["first step"] = measure_first_step(tiny)
    if "keras" in parts:
        from tests.benchmarks.keras_step import measure_keras  # it takes seconds to import

        _say("Keras")
        results["keras"] = measure_keras(tiny, pace * 40, fewest)
    return results


def conditions() -> Results:
    """The machine, what is installed, and the day."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {
            "Python": platform.python_version(),
            "torch": version("torch"),
            "regkit": version("torch-regkit"),
            "keras": version("keras"),
        },
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _say(what: str) -> None:
    print(f"measuring: {what}", file=sys.stderr, flush=True)
