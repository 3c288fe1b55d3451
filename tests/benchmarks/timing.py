"""How time is taken: in turns, in one process, each block of steps beside those that it is compared with.

What is timed is the processor time of the one thread, which another process can stretch (it shares the memory and the
caches) but not add to. Where the system maps memory anew for a step, that is in its time: page faults tell of it.
"""

from __future__ import annotations

import gc
import random
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median, quantiles
from time import monotonic, thread_time_ns
from typing import NamedTuple, Protocol


class Sample(NamedTuple):
    """A block of consecutive steps, by its mean step.

    seconds: of all of it; at_step: of the part that is the optimizer's step; faults: pages that were mapped in it.
    """

    seconds: float
    at_step: float
    faults: float


now = thread_time_ns


def faults() -> int:
    """The pages that were mapped for this process so far without reading a disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


class Timed(Protocol):
    """A step that can be timed, and the same step with nothing added."""

    name: str

    @property
    def base(self) -> Timed:
        """What it is compared with."""

    def block(self, steps: int) -> Sample:
        """Take consecutive steps."""


@contextmanager
def undisturbed() -> Iterator[None]:
    """No garbage collection inside, as in `timeit`; what is left from before is collected first, if it is young."""
    gc.collect(1)
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def rounds(seconds: float, fewest: int) -> Iterator[random.Random]:
    """Rounds until the time is up, and a source of orders for each."""
    end, done, order = monotonic() + seconds, 0, random.Random(0)
    while done < fewest or monotonic() < end:
        yield order
        done += 1


def beside(timed: Sequence[Timed], steps: int, seconds: float, fewest: int) -> dict[str, list[tuple[Sample, Sample]]]:
    """Every block of steps between two of its base (A/B/A): its samples, each with the mean of the two beside it.

    Neighbours with one base share it. The order is drawn anew for each round.
    """
    found: dict[str, list[tuple[Sample, Sample]]] = {one.name: [] for one in timed}
    for order in rounds(seconds, fewest):
        last: tuple[Timed, Sample] | None = None
        for one in order.sample(timed, len(timed)):
            before = last[1] if last is not None and last[0] is one.base else one.base.block(steps)
            here = one.block(steps)
            after = one.base.block(steps)
            last = one.base, after
            found[one.name].append((here, Sample(*(sum(pair) / 2 for pair in zip(before, after, strict=True)))))
    return found


def in_turns(timed: Mapping[str, Callable[[], float]], seconds: float, fewest: int) -> dict[str, list[float]]:
    """A sample of each in every round, in an order that is drawn anew."""
    found: dict[str, list[float]] = {name: [] for name in timed}
    for order in rounds(seconds, fewest):
        for name in order.sample(list(timed), len(timed)):
            with undisturbed():
                found[name].append(timed[name]())
    return found


def quartiles(samples: Sequence[float]) -> list[float]:
    """The median, the lower and the upper quartile, in as many digits as mean anything, and the number of samples."""
    low, high = quantiles(samples, n=4, method="inclusive")[::2]
    return [_short(median(samples)), _short(low), _short(high), len(samples)]


def _short(number: float) -> float:
    return float(f"{number:.4g}")
