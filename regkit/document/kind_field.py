"""The fields of a document that hold any installed kind of some families."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError, ValidationInfo
from pydantic_core import CoreSchema, core_schema

from regkit.document import shorthand
from regkit.document.context import MissingKind, ReadingContext
from regkit.fields import mistake, mistakes_at
from regkit.kinds import Kind
from regkit.registry.entries import CONTRACTS
from regkit.registry.names import Family


@dataclass(frozen=True)
class KindField:
    """A field that holds any installed kind of some families.

    The registry is asked at each validation, so that kinds may be registered at any time; the members of pydantic's own
    discriminated unions are fixed when a model is defined.
    """

    families: tuple[Family, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_plain_validator_function(
            self._validate, serialization=core_schema.plain_serializer_function_ser_schema(_dump_kind)
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"x-open-union": list(self.families)}  # `regkit.schema` fills this in

    def _validate(self, value: Any, info: ValidationInfo) -> Kind:
        if isinstance(value, Kind):
            return self._of_family(value)
        reading = ReadingContext.from_validation(info)
        try:
            options = shorthand.canonical(value, self.families, reading.registry)
        except shorthand.KindError as error:
            sentence = str(error)
            if isinstance(error, shorthand.UnknownKindError):
                sentence += reading.absence(error.name)
                if reading.unknown == "keep":
                    saved = reading.saved(error.name)
                    given = _plain(value)
                    return MissingKind.model_construct(kind=error.name, given=given, saved=saved, reason=sentence)
            if isinstance(value, dict) and "kind" in value:
                raise mistakes_at([("kind", value["kind"], sentence)]) from None
            raise mistake(sentence) from None
        except shorthand.ShorthandError as error:
            raise mistake(str(error)) from None
        # A ValidationError of the kind's own class is put under this field's place by pydantic.
        made = reading.registry.kind(options["kind"], *self.families)
        try:
            return _made(made, options, info.context)
        except ValidationError:
            raise
        except Exception as error:  # a kind's author may compute anything with options
            raise mistake(f"{options['kind']} cannot be made of these options: {error!r}") from error

    def _of_family(self, kind: Kind) -> Kind:
        """A kind that Python code has made, which need not be registered to be used, only to be saved."""
        if not any(isinstance(kind, CONTRACTS[family]) for family in self.families):
            raise mistake(f"{type(kind).__name__} is not a {' or '.join(self.families)}")
        return kind


def _made(cls: type[Kind], options: dict[str, Any], context: Any) -> Kind:
    """The kind with these options, read as JSON: a list fills a tuple or a set there, a string an enumeration.

    pydantic's strictness tells a list from a tuple in Python, where both can be written, and not in JSON.
    """
    try:
        text = json.dumps(options, allow_nan=True)
    except (TypeError, ValueError, RecursionError):  # Python code made the rule, of values that no JSON has
        return cls.model_validate(options, context=context)
    try:
        return cls.model_validate_json(text, context=context)
    except ValidationError as error:
        if any(one["type"] == "json_invalid" for one in error.errors(include_url=False)):  # half a character, say
            return cls.model_validate(options, context=context)
        raise


def _plain(value: Any) -> Any:
    """A copy of a missing kind's value, which is refused if no document could hold the value unchanged."""
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        text.encode()
    except ValueError:
        raise mistake("it could not be saved as it is: it holds NaN, a number too large or half a character") from None
    return json.loads(text)


def _dump_kind(kind: Kind) -> Any:
    """The options without nulls that are defaults; of a missing kind the value in its document."""
    if isinstance(kind, MissingKind):
        return kind.given
    options = kind.model_dump(mode="json")
    for name, value in options.items():
        if isinstance(getattr(kind, name, None), (set, frozenset)):  # of which each process has an order of its own
            options[name] = sorted(value, key=json.dumps)
    fields = type(kind).model_fields
    return {name: value for name, value in options.items() if value is not None or fields[name].default is not None}


AnyPenalty = Annotated[Kind, KindField(("penalty", "activity penalty"))]
WeightPenalty = Annotated[Kind, KindField(("penalty",))]
OutputPenalty = Annotated[Kind, KindField(("activity penalty",))]
AnyConstraint = Annotated[Kind, KindField(("constraint",))]
AnySchedule = Annotated[Kind, KindField(("schedule",))]
