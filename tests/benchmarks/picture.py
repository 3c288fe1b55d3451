"""The picture: what each way adds to a step, and how that grows with layers and with their size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Results = dict[str, Any]

BARS = {
    "L2: regkit": "#1b7837",
    "L2: weight_decay, single": "#9ecae1",
    "L2: loss term": "#d95f02",
    "max-norm, every row violates: regkit": "#5aae61",
    "max-norm: Keras' formula": "#e7969c",
}
"""The ways that are shown side by side, and their colours."""


def draw(results: Results, path: Path) -> None:
    """Save it. Raises ImportError where there is no matplotlib: `pip install torch-regkit[examples]` brings it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = results.get("curves", {})
    figure = Figure(figsize=(5 * (1 + len(curves)), 4.2), layout="constrained")
    first, *others = figure.subplots(1, 1 + len(curves), squeeze=False)[0]
    workloads = {name: one for name, one in results["workloads"].items() if "L2: regkit" in one["rows"]}
    for place, (row, colour) in enumerate(BARS.items()):
        shares = [100 * max(0.0, one["rows"][row]["share"][0]) for one in workloads.values()]
        first.bar([at + 0.16 * (place - 2) for at in range(len(shares))], shares, 0.16, label=row, color=colour)
    first.set_xticks(range(len(workloads)), list(workloads))
    first.set(yscale="log", ylabel="% of the bare step", title="added to a step")
    first.set_ylim(top=8 * first.get_ylim()[1])  # room for the legend
    first.legend(fontsize=7, loc="upper left")
    for axes, (of, curve) in zip(others, curves.items(), strict=True):
        for row in next(iter(curve.values()))["rows"]:
            sizes = [int(size) for size in curve]
            axes.plot(sizes, [1e6 * one["rows"][row]["alone"][0] for one in curve.values()], marker=".", label=row)
        lowest = [1e6 * one["floors"]["axpy"][0] for one in curve.values()]
        axes.plot(sizes, lowest, ":", color="grey", label="floor: axpy")
        axes.set(xscale="log", yscale="log", xlabel=of, ylabel="µs a step", title=f"by {of}")
        axes.legend(fontsize=7)
    FigureCanvasAgg(figure).print_png(path)
