"""Strict scalars for the options of a kind: what the type says is what the document must hold.

pydantic's own strict float still takes numpy scalars, since `numpy.float64` is a `float`; these take a plain `int` or
`float` and nothing else. All are finite.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, Strict
from pydantic_core import PydanticCustomError


def _plain_number(value: Any) -> Any:
    if type(value) not in (int, float):
        raise PydanticCustomError("plain_number", "must be a plain number")
    return value


def _plain_integer(value: Any) -> Any:
    if type(value) is not int:
        raise PydanticCustomError("plain_integer", "must be a whole number")
    return value


_Number = Annotated[float, Strict(), Field(allow_inf_nan=False), BeforeValidator(_plain_number)]
_Integer = Annotated[int, Strict(), BeforeValidator(_plain_integer)]

Real = Annotated[_Number, Field()]
"""A finite number."""

NonNegative = Annotated[_Number, Field(ge=0)]
"""A finite number ≥ 0."""

Positive = Annotated[_Number, Field(gt=0)]
"""A finite number > 0."""

Fraction = Annotated[_Number, Field(ge=0, le=1)]
"""A number in [0, 1]."""

Count = Annotated[_Integer, Field(ge=1, le=2**53)]
"""A whole number ≥ 1."""

Index = Annotated[_Integer, Field(ge=0, le=2**53)]
"""A whole number ≥ 0."""
