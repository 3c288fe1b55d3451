"""Options of kinds of every type that an author would write and JSON can say."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field
from torch import Tensor

import regkit
from regkit import Penalty
from regkit.fields import Index, Positive


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Taps(Penalty):
    """A kind with an option of every type."""

    kind: Literal["test_taps"] = "test_taps"
    at: tuple[int, ...] = ()
    pair: tuple[int, float] = (1, 2.0)
    pairs: tuple[tuple[Index, Positive], ...] = ()
    some: Annotated[tuple[Index, ...], Field(max_length=2)] = ()
    names: frozenset[str] = frozenset()
    seen: set[int] = Field(default_factory=set)
    grid: list[list[float]] = Field(default_factory=list)
    colour: Colour = Colour.RED
    ranges: dict[str, tuple[int, int]] = Field(default_factory=dict)
    either: int | tuple[int, ...] | None = None
    word: Literal["a", "b"] = "a"

    def value(self, w: Tensor) -> Tensor:
        return w.square().sum()


@pytest.fixture
def registry() -> Iterator[regkit.Registry]:
    registry = regkit.Registry()
    registry.register(Taps)
    return registry


def rule(**options: Any) -> dict[str, Any]:
    return {"rules": [{"penalty": {"kind": "test_taps", "strength": 1.0, **options}}]}


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"at": [2, 3]}, (2, 3)),
        ({"at": (2, 3)}, (2, 3)),  # a document that Python code made
        ({"at": []}, ()),
        ({"pair": [3, 0.5]}, (3, 0.5)),
        ({"pairs": [[0, 0.5], [7, 1]]}, ((0, 0.5), (7, 1.0))),
        ({"some": [0, 1]}, (0, 1)),
        ({"names": ["b", "a"]}, frozenset("ab")),
        ({"seen": [1, 1, 2]}, {1, 2}),
        ({"grid": [[1, 2.5], []]}, [[1.0, 2.5], []]),
        ({"colour": "blue"}, Colour.BLUE),
        ({"ranges": {"x": [0, 9]}}, {"x": (0, 9)}),
        ({"either": [1]}, (1,)),
        ({"either": 1}, 1),
        ({"either": None}, None),
        ({"word": "b"}, "b"),
    ],
)
def test_an_option_is_read_and_saved_and_read_again(options, wanted, registry):
    spec = regkit.load(rule(**options), registry=registry)
    (name,) = options
    assert getattr(spec.rules[0].penalty, name) == wanted
    again = regkit.load(spec.to_json(registry), registry=registry)
    assert again == spec
    assert again.to_json(registry) == spec.to_json(registry)


@pytest.mark.parametrize(
    ("options", "where", "sentence"),
    [
        ({"at": ["2"]}, "at/0", "must be a valid integer, got '2'"),
        ({"at": [1.5]}, "at/0", "must be a valid integer, got 1.5"),
        ({"at": [True]}, "at/0", "must be a valid integer, got true"),
        ({"at": 2}, "at", "must be a list, got 2"),
        ({"at": {"0": 2}}, "at", "must be a list, got {'0': 2}"),
        ({"pairs": [[1, "x"]]}, "pairs/0/1", "must be a plain number, got 'x'"),
        ({"pairs": [[1, 0]]}, "pairs/0/1", "must be greater than 0, got 0"),
        ({"some": [1, 2, 3]}, "some", "at most 2 items"),
        ({"names": [1]}, "names/0", "must be a string, got 1"),
        ({"names": "ab"}, "names", "must be a list, got 'ab'"),
        ({"grid": [[1], ["x"]]}, "grid/1/0", "must be a valid number, got 'x'"),
        ({"colour": "green"}, "colour", "must be 'red' or 'blue', got 'green'"),
        ({"word": "\ud800"}, "word", r"got '\ud800'"),
        ({"names": ["\ud800"]}, "names", "must be a"),
    ],
)
def test_a_value_of_another_type_is_refused_where_it_stands(options, where, sentence, registry):
    with pytest.raises(regkit.SpecError) as caught:
        regkit.load(rule(**options), registry=registry)
    (problem, *_) = caught.value.problems
    assert problem.where == f"/rules/0/penalty/{where}"
    assert sentence in problem.message


def test_a_kind_whose_name_has_no_default_is_still_made_without_it():
    class Bare(regkit.Schedule):
        kind: Literal["test_bare"]

        def factor(self, step: int) -> float:
            return 1.0

    assert Bare().kind == "test_bare"  # type: ignore[call-arg]  # to a checker the name is required
