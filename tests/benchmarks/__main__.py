"""What regularization costs, beside what people do instead.

python -m tests.benchmarks            half an hour, best on a machine that does nothing else
python -m tests.benchmarks --quick    some minutes, and more noise
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from tests.benchmarks import report
from tests.benchmarks.bars import bars
from tests.benchmarks.parts import PARTS, measure_all
from tests.benchmarks.picture import draw

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("results.json")


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and write what was asked for. Returns 1 where --check finds a bar that does not hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a fifth of the time")
    parser.add_argument("--only", metavar="A,B", help=f"these parts of it: {', '.join(PARTS)}")
    parser.add_argument("--tiny", action="store_true", help="a few seconds in tiny sizes, to see that it runs")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write results.json, table.md and costs.png there")
    parser.add_argument("--results", type=Path, metavar="FILE", help="measure nothing: read what was written once")
    parser.add_argument("--readme", action="store_true", help=f"write {RESULTS.name} beside this, and README's table")
    parser.add_argument("--check", action="store_true", help="print every bar, and whether it holds")
    options = parser.parse_args(arguments)
    parts = options.only.split(",") if options.only else list(PARTS)
    if unknown := set(parts) - set(PARTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    torch.set_num_threads(1)
    if options.results:
        results = json.loads(options.results.read_text(encoding="utf-8"))
    else:
        results = measure_all(parts, 0.0 if options.tiny else 0.2 if options.quick else 1.0, options.tiny)
    results["bars"] = [{**asdict(bar), "passed": bar.passed} for bar in bars(results)]
    print(report.full(results))
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / RESULTS.name).write_text(report.to_json(results), encoding="utf-8")
        (options.output / "table.md").write_text(report.full(results) + "\n", encoding="utf-8")
        draw(results, options.output / "costs.png")
    if options.readme:
        RESULTS.write_text(report.to_json(results), encoding="utf-8")
        report.put_into(ROOT / "README.md", results)
    if options.check:
        print(f"\n{report.checked(results)}")
        return int(not all(bar["passed"] for bar in results["bars"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
