"""Docstrings are statements, and the examples in them are true: of regkit, and of the standard kinds and adapters."""

from __future__ import annotations

import doctest
import inspect
import re
from collections.abc import Iterator
from importlib import import_module, metadata
from typing import Any

import pytest
import torch
from torch import nn

import regkit
from regkit import Adapter
from regkit.kinds import Kind
from tests.support.docstrings import EVERY, FILES, ROOT, Docstring, docstrings

# --- first lines -----------------------------------------------------------------------------------------------------

NO_NOUN = re.compile(r"\b(it|those|what|ours|theirs|them|they|whose)\b|^(The same|None|Its|These are)\b", re.IGNORECASE)
"""A first line names its object by a noun."""


@pytest.mark.parametrize("path", FILES, ids=str)
def test_first_lines_name_their_object(path):
    assert not [f"{one.name}: {one.first_line}" for one in docstrings(path) if NO_NOUN.search(one.first_line)]


def test_docstrings_are_found_in_modules_classes_and_functions():
    names = {str(one) for one in EVERY}
    assert {"regkit", "regkit.kinds", "regkit.kinds.penalty.Penalty.value", "regkit_standard.l1_l2.L2"} <= names


# --- examples --------------------------------------------------------------------------------------------------------

PUBLIC = ("activity", "kinds", "fields", "buckets", "errors", "testing")
STANDARD = sorted(
    {one.module for one in metadata.entry_points(group="regkit") if one.module.startswith("regkit_standard.")}
)
NEEDED = {
    "regkit_standard.ncps_adapters": "ncps.torch",
    "regkit.integrations.lightning": "lightning",
    "regkit.integrations.skorch": "skorch",
    "regkit.integrations.transformers": "transformers",
}
"""The package that a module needs."""
SLOW = {"regkit.integrations.transformers"}
"""Modules that take many seconds to import."""


def classes_of(module: str) -> Iterator[type[Any]]:
    """The public classes that the module defines, or takes into its `__all__`."""
    room = import_module(module)
    for name, value in inspect.getmembers(room, inspect.isclass):
        if name in getattr(room, "__all__", ()) or (value.__module__ == module and not name.startswith("_")):
            yield value


OFFERED = [value for module in STANDARD for value in classes_of(module)]


def public_classes() -> set[str]:
    """The qualified names of all public classes."""
    top = (getattr(regkit, name) for name in regkit.__all__)
    rooms = (value for name in PUBLIC for value in classes_of(f"regkit.{name}"))
    classes = {value for value in (*top, *rooms, *OFFERED) if inspect.isclass(value)}
    trainers = {
        f"regkit.integrations.{path.stem}.{name}"
        for path in (ROOT / "regkit/integrations").glob("*.py")
        for name in re.findall(r"^class ([A-Z]\w*)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    return {f"{value.__module__}.{value.__qualname__}" for value in classes} | trainers


WITH_EXAMPLES = [
    pytest.param(one, id=str(one), marks=[pytest.mark.slow] if one.module in SLOW else [])
    for one in EVERY
    if ">>>" in one.text
]


def test_every_standard_kind_and_adapter_is_public():
    assert len(STANDARD) >= 7
    assert len(OFFERED) >= 20
    assert all(issubclass(one, (Kind, Adapter)) for one in OFFERED)
    assert {f"{one.__module__}.{one.__qualname__}" for one in OFFERED} <= public_classes()


def test_every_public_class_has_an_example():
    classes = public_classes()
    assert len(classes) > 60
    without = sorted(classes - {str(one.values[0]) for one in WITH_EXAMPLES})
    assert not without, ", ".join(without)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")  # Lightning's advice
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning")  # Lightning's use of torch
@pytest.mark.parametrize("docstring", WITH_EXAMPLES)
def test_examples_are_true(docstring: Docstring):
    if docstring.module in NEEDED:
        pytest.importorskip(NEEDED[docstring.module])
    names = {**vars(import_module(docstring.module)), "regkit": regkit, "torch": torch, "nn": nn}
    names.pop("annotations", None)  # or an example would be compiled with `from __future__ import annotations`
    test = doctest.DocTestParser().get_doctest(docstring.text, names, str(docstring), None, 0)
    output: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    assert runner.run(test, out=output.append).failed == 0, "".join(output)
