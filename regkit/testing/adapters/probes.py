"""Kinds with values known by hand, and a registry of these kinds and one adapter alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

import regkit
from regkit.activity import Segment
from regkit.activity.padding import Validity
from regkit.adapters import Adapter, Output, OutputSite, Weight


class Mark(regkit.Penalty):
    """Σw: its gradient is 1 wherever a rule reaches."""

    kind: Literal["mark"] = "mark"

    ranks: ClassVar[tuple[int, ...]] = (0, 1, 2, 3, 4)

    def value(self, w: Tensor) -> Tensor:
        return w.sum()


class Squares(regkit.Penalty):
    """Σw²."""

    kind: Literal["squares"] = "squares"

    ranks: ClassVar[tuple[int, ...]] = (0, 1, 2, 3, 4)

    def value(self, w: Tensor) -> Tensor:
        return w.square().sum()


class MeanSquare(regkit.ActivityPenalty):
    """Mean h²."""

    kind: Literal["mean_square"] = "mean_square"

    def value(self, activity: regkit.Activity) -> Tensor:
        return activity.reduce(torch.square, self.reduction)


class Neighbours(regkit.ActivityPenalty):
    """Mean (h_t − ½ h_{t−1})²: another value where the two change places."""

    kind: Literal["neighbours"] = "neighbours"

    sequence: ClassVar[bool] = True

    def value(self, activity: regkit.Activity) -> Tensor:
        return activity.reduce_pairs(lambda h, previous: (h - previous / 2).square(), self.reduction)


class _Plugin:
    """A plugin of the adapter on trial and the kinds of this room."""

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter
        self.__module__ = type(adapter).__module__  # whose it is, in the sentence of an error

    @regkit.hookimpl
    def regkit_adapters(self) -> list[Adapter]:
        return [self._adapter]

    @regkit.hookimpl
    def regkit_penalties(self) -> list[type[regkit.Penalty]]:
        return [Mark, Squares]

    @regkit.hookimpl
    def regkit_activity_penalties(self) -> list[type[regkit.ActivityPenalty]]:
        return [MeanSquare, Neighbours]


def registry_of(adapter: Adapter) -> regkit.Registry:
    """A registry with this adapter and the kinds of this room."""
    return regkit.Registry([_Plugin(adapter)], entry_points=False)


def numbered(adapter: Adapter, module: nn.Module, weights: Sequence[Weight]) -> Adapter:
    """An adapter in which each weight is a layer of its own, so that a target can choose any weight."""

    class Numbered(Adapter):
        modules: ClassVar[tuple[type[nn.Module] | str, ...]] = (type(module),)
        gates: ClassVar[tuple[str, ...]] = tuple(adapter.gates)
        roles: ClassVar[tuple[str, ...]] = tuple(adapter.roles)
        ignored: ClassVar[tuple[str, ...]] = ("*",)

        def weights(self, module: nn.Module) -> list[Weight]:
            # Of what is kept, not of a function of it: gradients are to be 1.
            plain = [replace(weight, through=None) for weight in weights]
            return [replace(weight, layer=number, direction="forward") for number, weight in enumerate(plain)]

        def outputs(self, module: nn.Module) -> list[Output]:
            return []

        def observe(
            self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
        ) -> Mapping[str, Any]:
            return {}

        def segments(
            self,
            module: nn.Module,
            site: OutputSite,
            observed: Mapping[str, Any],
            valid: Validity | None,
            step: int,
        ) -> list[Segment]:
            return []

    return Numbered()
