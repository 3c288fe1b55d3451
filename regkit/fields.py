"""Strict scalars for the options of a kind, and errors for validators to raise.

pydantic's own strict float still takes numpy scalars, since `numpy.float64` is a `float`; these take a plain `int` or
`float` and nothing else. All are finite.

>>> from typing import Literal
>>> class Cubes(regkit.Schedule):
...     kind: Literal["cubes"] = "cubes"
...     steps: regkit.fields.Count
...     def factor(self, step):
...         return min(1.0, (step / self.steps) ** 3)
>>> Cubes(steps=10).factor(5)
0.125
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError


def mistake(message: str) -> PydanticCustomError:
    """The error for a validator to raise, with a sentence that pydantic files under the field's place.

    >>> print(regkit.fields.mistake("must be even"))
    must be even
    """
    # The message is a value of the template: braces in a document's strings must not be read as fields. A lone
    # surrogate, which JSON can write and UTF-8 cannot, is shown by its escape.
    shown = message.encode("utf-8", "backslashreplace").decode("utf-8")
    return PydanticCustomError("regkit", "{message}", {"message": shown})


def mistakes_at(mistakes: Iterable[tuple[str, Any, str]]) -> ValidationError:
    """The error for several mistakes at keys below the validated field: each a key, the value there, the sentence.

    >>> regkit.fields.mistakes_at([("a", 1, "must be even"), ("b", 3, "must be even")]).error_count()
    2
    """
    details = [InitErrorDetails(type=mistake(message), loc=(key,), input=given) for key, given, message in mistakes]
    return ValidationError.from_exception_data("regkit", details)


def _plain_number(value: Any) -> Any:
    if type(value) not in (int, float):
        raise PydanticCustomError("plain_number", "must be a plain number")
    return value


def _plain_integer(value: Any) -> Any:
    if type(value) is not int:
        raise PydanticCustomError("plain_integer", "must be a whole number")
    return value


# The check of the type is the last annotation, so that it runs first, and the limits before it reach the JSON Schema.
_LIMIT = 2**53

Real = Annotated[float, Field(strict=True, allow_inf_nan=False), BeforeValidator(_plain_number)]
"""A finite number."""

NonNegative = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0), BeforeValidator(_plain_number)]
"""A finite number ≥ 0."""

Positive = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0), BeforeValidator(_plain_number)]
"""A finite number > 0."""

Fraction = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0, le=1), BeforeValidator(_plain_number)]
"""A number in [0, 1]."""

Count = Annotated[int, Field(strict=True, ge=1, le=_LIMIT), BeforeValidator(_plain_integer)]
"""A whole number ≥ 1."""

Index = Annotated[int, Field(strict=True, ge=0, le=_LIMIT), BeforeValidator(_plain_integer)]
"""A whole number ≥ 0."""
