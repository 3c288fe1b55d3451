"""Errors go from one process to another, as from a worker of a data loader, with everything that they say."""

from __future__ import annotations

import pickle

import pytest

import regkit

PROBLEMS = [regkit.Problem("/rules/0", "names no kind", 3, 5), regkit.Problem("/rules/1", "binds nothing")]
CLASSES = [getattr(regkit, name) for name in regkit.__all__ if name.endswith(("Error", "Warning"))]
MADE = {cls: cls("spec.json", PROBLEMS) if hasattr(cls, "verb") else cls("a sentence") for cls in CLASSES}


def test_every_public_error_is_among_these():
    errors = {value for value in vars(regkit.errors).values() if isinstance(value, type) and value.__name__[0] != "_"}
    assert set(CLASSES) == {value for value in errors if issubclass(value, Exception)}


@pytest.mark.parametrize("error", MADE.values(), ids=lambda error: type(error).__name__)
def test_an_error_is_pickled_with_all_that_it_says(error):
    error.where = "in a worker"
    loaded = pickle.loads(pickle.dumps(error))
    assert type(loaded) is type(error)
    assert str(loaded) == str(error)
    assert vars(loaded) == vars(error)
