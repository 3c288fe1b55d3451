"""Strict scalars for the options of a kind, and how a validator says what is wrong with one.

pydantic's own strict float still takes numpy scalars, since `numpy.float64` is a `float`; these take a plain `int` or
`float` and nothing else. All are finite.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, Strict, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError


def mistake(message: str) -> PydanticCustomError:
    """What a validator raises: a sentence of our own, which pydantic files under the field's place."""
    # The message is a value of the template: braces that a document holds in its strings must not be read as fields.
    return PydanticCustomError("regkit", "{message}", {"message": message})


def mistake_at(where: tuple[str, ...], value: Any, message: str) -> ValidationError:
    """The same for a place below the field being validated."""
    details = InitErrorDetails(type=mistake(message), loc=where, input=value)
    return ValidationError.from_exception_data("regkit", [details])


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
