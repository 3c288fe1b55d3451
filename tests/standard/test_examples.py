"""The examples in the docstrings of the standard kinds and adapters, as `doctest` runs them."""

from __future__ import annotations

import doctest
import inspect
from importlib import import_module, metadata
from typing import Any

import pytest

from regkit import Adapter
from regkit.kinds import Kind

ROOMS = sorted(
    {one.module for one in metadata.entry_points(group="regkit") if one.module.startswith("regkit_standard.")}
)
OFFERED = [
    value
    for room in ROOMS
    for name, value in vars(import_module(room)).items()
    if inspect.isclass(value) and value.__module__ == room and not name.startswith("_")
]


def test_every_standard_kind_and_adapter_is_among_those_whose_examples_run():
    assert len(ROOMS) >= 7
    assert len(OFFERED) >= 20
    assert all(issubclass(one, (Kind, Adapter)) for one in OFFERED)


@pytest.mark.parametrize("offered", OFFERED, ids=lambda cls: f"{cls.__module__.split('.')[-1]}.{cls.__name__}")
def test_the_docstring_has_an_example_which_is_true(offered: Any):
    if offered.__module__.endswith("ncps_adapters"):
        pytest.importorskip("ncps.torch")
    room = vars(import_module(offered.__module__))
    test = doctest.DocTestParser().get_doctest(inspect.cleandoc(offered.__doc__), dict(room), offered.__name__, None, 0)
    told: list[str] = []
    assert test.examples
    assert doctest.DocTestRunner().run(test, out=told.append).failed == 0, "".join(told)
