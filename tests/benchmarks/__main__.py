"""What regularization costs, beside what people do instead.

python -m tests.benchmarks                  three quarters of an hour, best on a machine that does nothing else
python -m tests.benchmarks --quick          a quarter of an hour, and more noise
python -m tests.benchmarks --against REV    this version beside another
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks import against, report
from tests.benchmarks.bars import bars
from tests.benchmarks.parts import PARTS, measure_all
from tests.benchmarks.picture import draw

RESULTS = Path(__file__).with_name("results.json")
PAGE = Path(__file__).parents[2] / "docs/costs.md"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a fraction of the time")
    parser.add_argument("--only", metavar="A,B", help=f"these parts of it: {', '.join(PARTS)}")
    parser.add_argument("--tiny", action="store_true", help="a few seconds in tiny sizes, to see that it runs")
    parser.add_argument("--check", action="store_true", help="print every bar, and whether it holds")
    parser.add_argument("--against", metavar="REV", help="measure this version beside another of its git history alone")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write results.json, table.md and costs.png there")
    parser.add_argument("--results", type=Path, metavar="FILE", help="measure nothing: read what was written once")
    parser.add_argument(
        "--publish", action="store_true", help=f"write {RESULTS.name} beside this, and docs/{PAGE.name}"
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and write what was asked for. Returns 1 where --check finds a bar that does not hold."""
    parser = _parser()
    options = parser.parse_args(arguments)
    known = against.WORKLOADS if options.against else PARTS
    parts = options.only.split(",") if options.only else list(known)
    if unknown := set(parts) - set(known):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if options.against:
        if options.output or options.results or options.publish:
            parser.error("--against prints what it finds, and writes and reads nothing")
        return _against(options, parts)
    torch.set_num_threads(1)
    if options.results:
        results = json.loads(options.results.read_text(encoding="utf-8"))
    else:
        results = measure_all(parts, 0.0 if options.tiny else 0.2 if options.quick else 1.0, options.tiny)
    results["bars"] = [{**asdict(bar), "passed": bar.passed} for bar in bars(results)]
    print(report.full(results))
    _write(options, results)
    if options.check:
        print(f"\n{report.checked(results)}")
        return int(not all(bar["passed"] for bar in results["bars"]))
    return 0


def _write(options: argparse.Namespace, results: dict[str, Any]) -> None:
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / RESULTS.name).write_text(report.to_json(results), encoding="utf-8")
        (options.output / "table.md").write_text(report.full(results) + "\n", encoding="utf-8")
        draw(results, options.output / "costs.png")
    if options.publish:
        RESULTS.write_text(report.to_json(results), encoding="utf-8")
        report.put_into(PAGE, results)


def _against(options: argparse.Namespace, parts: Sequence[str]) -> int:
    processes, seconds, shorter = (1, 0.0, 1) if options.tiny else (3, 2.0, 2) if options.quick else (7, 12.0, 1)
    pace = {"seconds": seconds, "tiny": options.tiny, "shorter": shorter}
    figures = against.compare(options.against, parts, processes, pace)
    print(against.table(figures, options.against))
    if options.check:
        print(f"\n{against.checked(figures)}")
        return int(not all(bar.passed for _, bar in against.bars(figures)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
