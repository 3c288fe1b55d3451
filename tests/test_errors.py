"""Errors go from one process to another, as from a worker of a data loader, with everything that they say."""

from __future__ import annotations

import pickle

import pytest

import regkit
from regkit.errors import listing, nearest

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


@pytest.mark.parametrize(
    ("given", "known", "name"),
    [
        ("abcd", "abcx", "abcx"),
        ("abcd", "abxy", None),
        ("fo", "f", None),
        ("F", "f", "f"),
        ("KERNAL", "Kernel", "Kernel"),
    ],
)
def test_the_nearest_name_is_alike_in_three_of_four_letters_and_no_letter_unless_a_letter_is_given(given, known, name):
    assert nearest(given, [known]) == name


def test_a_listing_names_each_name_once_and_says_how_many_more_there_are():
    assert listing(["b", "a", "b"]) == "b, a"
    assert listing([]) == "none"
    names = [f"n{number}" for number in range(30)]
    assert listing(names) == ", ".join(names[:24]) + " and 6 more"


def test_an_error_tells_a_hundred_problems_and_says_how_many_more_there_are():
    told = str(regkit.SpecError("spec.json", [regkit.Problem("", "wrong")] * 103)).splitlines()
    assert told[0] == "spec.json is not a valid spec: 103 problems"
    assert told[100:] == ["  (document): wrong", "  and 3 more (all are in .problems)"]
    assert str(regkit.SpecError("spec.json", PROBLEMS[:1])).startswith("spec.json is not a valid spec: 1 problem\n")
