"""The laws of a function of tensors: each is tried on a kind's functions by the family of the kind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from regkit import ActivityPenalty, Penalty
from regkit.testing.laws import Interrupted, hold
from regkit.testing.samples.tensors import difference, identical, strided

Sample = TypeVar("Sample")
AnyPenalty = TypeVar("AnyPenalty", Penalty, ActivityPenalty)

Function = Callable[[Tensor], Tensor]
"""A function of one weight, or of the outputs of a module."""

Functions = Iterable[tuple[str, Function]]
"""Functions by name, such as `value()`."""

WEIGHT: Final = "weight"
OUTPUTS: Final = "outputs"


def named(w: Tensor, noun: str = WEIGHT) -> str:
    """A tensor with its dtype and shape, for a sentence: `a torch.float16 weight (3, 5)`."""
    return _phrase(noun, w.shape, str(w.dtype))


def _phrase(noun: str, shape: Sequence[int], adjective: str = "") -> str:
    article = "a" if noun == WEIGHT else ""
    return " ".join(filter(None, (article, adjective, noun, str(tuple(shape)))))


def fits(result: object, shape: Sequence[int], dtype: torch.dtype, call: str) -> None:
    """Raise Broken unless the result of a call is a tensor of this shape and dtype."""
    if not isinstance(result, Tensor):
        hold(False, f"{call} is a {type(result).__name__}, not a tensor")
    else:
        hold(result.shape == tuple(shape), f"{call} has shape {tuple(result.shape)}, not {tuple(shape)}")
        hold(result.dtype == dtype, f"{call} is {result.dtype}, not {dtype}")


def is_finite(
    functions: Iterable[tuple[str, Callable[[Sample], Tensor]]], samples: Iterable[tuple[str, Sample]]
) -> None:
    """Raise Broken where the result of a function has infinite entries or NaNs.  samples: by description."""
    functions = list(functions)
    for description, sample in samples:
        for name, function in functions:
            result = function(sample)
            strange = result[~result.isfinite()].flatten()[:1].tolist()
            hold(not strange, f"{name} of {description} has {strange} in it: not finite")


def is_not_negative(functions: Functions, samples: Iterable[tuple[str, Tensor]]) -> None:
    """Raise Broken where a value is below 0 by more than rounding.  samples: by description."""
    functions = list(functions)
    for description, sample in samples:
        for name, function in functions:
            value, rounding = float(function(sample)), 1e-9 * (1 + float(sample.square().sum()))
            hold(not value < -rounding, f"{name} of {description} is {value}")


def leaves_alone(functions: Functions, samples: Sequence[Tensor], noun: str = WEIGHT) -> None:
    """Raise Broken where a function writes into its argument, or sets its requires_grad."""
    for name, function in functions:
        for sample in samples:
            before, version = sample.clone(), sample._version
            with torch.no_grad():
                function(sample)
            same = identical(sample, before)
            how = "the same numbers" if same else f"an entry is off by {difference(sample, before):g} of the size"
            hold(same and sample._version == version, f"{name} wrote into {named(sample, noun)}: {how}")
            hold(not sample.requires_grad, f"{name} left requires_grad on {named(sample, noun)}")


def strides_do_not_matter(functions: Functions, samples: Sequence[Tensor]) -> None:
    """Raise Broken where a function gives another result for a tensor that is not contiguous."""
    for name, function in functions:
        for sample in samples:
            off = difference(function(strided(sample)), function(sample))
            hold(off < 1e-9, f"{name} of {named(sample)} as a view is off by {off:.3g} times its size")


def accumulates_wide(functions: Functions, samples: Sequence[Tensor], room: float, noun: str = WEIGHT) -> None:
    """Raise Broken where the result for half-precision numbers is farther than `room` from that for float64."""
    for name, function in functions:
        for sample in samples:
            result, exact = function(sample), function(sample.double())
            off = difference(result, exact)
            sizes = [float(one.double().abs().max()) for one in (result, exact)]
            hold(
                off <= room,
                f"{name} of {named(sample, noun)} is off by {off:.3g} times its size: {sizes[0]:.6g}, where float64 "
                f"has {sizes[1]:.6g}",
            )


def shows_nan(
    functions: Functions,
    samples: Iterable[tuple[Tensor, int]],
    noun: str = WEIGHT,
    errors: type[Exception] | tuple[type[Exception], ...] = Exception,
) -> None:
    """Raise Broken where a function makes a number of a NaN.

    samples: tensors, each with the entry that becomes a NaN; a result of the sample's shape is then NaN at that entry,
        any other result in its last entry.
    errors: exceptions that a function may raise instead.
    """
    functions = list(functions)
    for sample, place in samples:
        spoilt = sample.clone()
        spoilt.view(-1)[place] = torch.nan
        for name, function in functions:
            try:
                result = function(spoilt)
            except errors:
                continue
            entry = result.reshape(-1)[place if result.shape == sample.shape else -1]
            given = f"{named(sample, noun)} with a NaN at entry {place}"
            hold(entry.isnan(), f"{name} of {given} makes {entry.item():g} of it")


def never_waits(functions: Functions, shapes: Sequence[Sequence[int]], noun: str = WEIGHT) -> None:
    """Raise Broken where a function reads a number of its argument back: fake tensors have none; a constant may."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        for name, function in functions:
            for shape in shapes:
                try:
                    function(torch.empty(tuple(shape), dtype=torch.float64, device="cpu"))
                except Exception as error:  # a stranger's code, without data: anything can come out
                    given = f"{name} of {_phrase(noun, shape, 'fake')}"
                    raise Interrupted(f"{given} raised {type(error).__name__}: {error}") from error


def stays_on_device(functions: Functions, shapes: Sequence[Sequence[int]], noun: str = WEIGHT) -> None:
    """Raise Broken where a function of a tensor on `meta` raises, or leaves that device."""
    for name, function in functions:
        for shape in shapes:
            given = f"{name} of {_phrase(noun, shape)} on meta"
            try:
                result = function(torch.empty(tuple(shape), dtype=torch.float64, device="meta"))
            except Exception as error:  # as above
                raise Interrupted(f"{given} raised {type(error).__name__}: {error}") from error
            hold(result.is_meta, f"{given} is on {result.device}")


def ignores_strength(
    penalty: AnyPenalty, functions: Callable[[AnyPenalty], Functions], samples: Sequence[Tensor]
) -> None:
    """Raise Broken where a function of a penalty changes with the strength."""
    twin = penalty.model_copy(update={"strength": 2 * penalty.strength + 1})
    for (name, function), (_, same) in zip(functions(penalty), functions(twin), strict=True):
        for sample in samples:
            result, other = function(sample).detach(), same(sample).detach()
            hold(
                identical(result, other),
                f"{name} changes by {difference(other, result):.3g} times its size when strength goes from "
                f"{penalty.strength} to {twin.strength}",
            )
