"""The report of word_lm.py: a table, a picture of the curves, and a file of the numbers.

Source: the colours, which the colour-blind can tell apart, Okabe & Ito (2008).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev

import matplotlib
from rich import box
from rich.table import Table

matplotlib.use("Agg")  # before pyplot is imported: a picture needs no display
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

CAPTION = (
    "Mean ± standard deviation over seeds. Best valid: validation perplexity at each run's best epoch; all else after "
    "the last epoch. Train: perplexity on the training text, without dropout. Row norm: the largest, of the incoming "
    "weights of one gate unit of the LSTM. |h|: the LSTM's outputs on the validation text. ms/step: CPU time. Ratio: "
    "time per step over that of the same loop with nothing attached."
)
STYLES = (
    ("#000000", "-", "o"),
    ("#0072B2", "--", "s"),
    ("#D55E00", "-.", "^"),
    ("#009E73", ":", "D"),
)
TICKS = (40, 50, 60, 70, 80, 100, 150, 200, 300)


@dataclass(frozen=True)
class Run:
    """One training run: validation perplexity after each epoch, and what the model was like after the last."""

    valid: list[float]
    train: float
    largest_row: float
    mean_output: float


@dataclass(frozen=True)
class Pace:
    """CPU milliseconds per step, and how many times those of the same loop with nothing attached."""

    step: float
    ratio: float


@dataclass(frozen=True)
class Row:
    """All runs of one loop with one thing attached."""

    loop: str
    attached: str
    runs: list[Run]
    pace: Pace


def make_table(rows: Sequence[Row]) -> Table:
    """A section for each loop, which its row with nothing attached begins."""
    table = Table(box=box.SIMPLE_HEAD, caption=CAPTION, caption_justify="left")
    for column in ("loop", "attached"):
        table.add_column(column)
    for column in ("best valid", "last valid", "train", "row norm", "mean |h|", "ms/step", "ratio"):
        table.add_column(column, justify="right")
    for row, following in pairwise((*rows, None)):
        assert row is not None
        table.add_row(row.loop, row.attached, *cells(row), end_section=following is None or following.loop != row.loop)
    return table


def cells(row: Row) -> list[str]:
    """The numbers of a row, as text."""
    best, last = [min(run.valid) for run in row.runs], [run.valid[-1] for run in row.runs]
    perplexities = (best, last, [run.train for run in row.runs])
    norm, output = [run.largest_row for run in row.runs], [run.mean_output for run in row.runs]
    measured = [*(spread(values, 1) for values in perplexities), spread(norm, 2), spread(output, 3)]
    return [*measured, f"{row.pace.step:.1f}", f"{row.pace.ratio:.2f}"]


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation, the latter where there are two values at least."""
    plus_minus = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{plus_minus}"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Validation perplexity over epochs, a panel for each loop."""
    loops = list(dict.fromkeys(row.loop for row in rows))
    styles = dict(zip(dict.fromkeys(row.attached for row in rows), STYLES, strict=False))
    figure, panels = plt.subplots(1, len(loops), figsize=(10, 4.5), sharey=True, layout="constrained", squeeze=False)
    for panel, loop in zip(panels[0], loops, strict=True):
        for row in (row for row in rows if row.loop == loop):
            draw_curve(panel, row, styles[row.attached])
        finish(panel, loop)
    panels[0][0].set_ylabel("validation perplexity (log scale)")
    figure.suptitle("Word-level LSTM on Python's help topics: mean over seeds, in a band from lowest to highest")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_curve(panel: Axes, row: Row, style: tuple[str, str, str]) -> None:
    """One row's mean over seeds, in a band."""
    color, line, marker = style
    by_epoch = list(zip(*(run.valid for run in row.runs), strict=True))
    epochs = range(1, len(by_epoch) + 1)
    panel.plot(epochs, [mean(e) for e in by_epoch], line, color=color, marker=marker, markersize=4, label=row.attached)
    panel.fill_between(epochs, [min(e) for e in by_epoch], [max(e) for e in by_epoch], color=color, alpha=0.15, lw=0)


def finish(panel: Axes, title: str) -> None:
    """Axes that numbers can be read from."""
    panel.set_title(title, fontsize="medium")
    panel.set_xlabel("epoch")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set_yscale("log")
    low, high = panel.get_ylim()
    panel.set_yticks([tick for tick in TICKS if low <= tick <= high])
    panel.yaxis.set_major_formatter(ScalarFormatter())
    panel.yaxis.set_minor_locator(NullLocator())
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, title="attached")


def save(rows: Sequence[Row], size: Mapping[str, object], path: Path) -> None:
    """All the numbers, for another program."""
    numbers = {"size": dict(size), "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
