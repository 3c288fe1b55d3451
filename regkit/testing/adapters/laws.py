"""The laws of adapters: each weight and output is as its adapter declares; `check_adapter` and `check_example`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from regkit.adapters import Adapter, Equations, Example
from regkit.testing.adapters.case import Case, seeded
from regkit.testing.adapters.contract import CONTRACT
from regkit.testing.adapters.equations import EQUATIONS
from regkit.testing.adapters.forms import FORMS
from regkit.testing.adapters.lifecycle import TRACES
from regkit.testing.adapters.outputs import OUTPUTS
from regkit.testing.adapters.weights import WEIGHTS
from regkit.testing.laws import Laws, Report

__all__ = ["LAWS", "Case", "check_adapter", "check_example"]

LAWS: Laws[Case] = Laws(CONTRACT, WEIGHTS, EQUATIONS, OUTPUTS, FORMS, TRACES)
"""Every law of adapters."""


def check_adapter(
    adapter: Adapter,
    module_factory: Callable[[], nn.Module],
    *,
    features: int | None = None,
    equations: Equations | None = None,
    state: Callable[[nn.Module, int], Any] | None = None,
    call: Callable[[nn.Module, Any], Any] | None = None,
    ignored: tuple[str, ...] = (),
) -> Report:
    """Try every law on an adapter and a module that the factory makes; the options are as of `Example`.

    features: left out, the module's `input_size`. Raises TypeError where it has none.
    """
    if features is None:
        with seeded(0):
            features = getattr(module_factory(), "input_size", None)
        if not isinstance(features, int):
            raise TypeError("the module has no input_size: say features=, how many its input has")
    return check_example(adapter, Example(module_factory, features, equations, state, call, ignored))


def check_example(adapter: Adapter, example: Example) -> Report:
    """Try every law on an adapter and one of its examples: `[check_example(adapter, e) for e in adapter.examples()]`.

    An adapter that is not well formed is tried no further: all else would fail for that reason.
    """
    case = Case(adapter, example)
    report = CONTRACT.report(case, case.title)
    return LAWS.report(case, case.title) if report.passed else report
