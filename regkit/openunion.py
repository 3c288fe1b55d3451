"""Fields that hold any installed kind of some families: the open union."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationInfo
from pydantic_core import CoreSchema, core_schema

from regkit import shorthand
from regkit.fields import mistake, mistakes_at
from regkit.kinds import Kind
from regkit.registry import CONTRACTS, Family, Registry, default


def registry_of(info: ValidationInfo) -> Registry:
    """The registry that the reader was given, or that of everything installed."""
    registry = (info.context or {}).get("registry")
    return registry if isinstance(registry, Registry) else default()


@dataclass(frozen=True)
class OpenUnion:
    """A field that holds any installed kind of some families.

    The registry is asked at each validation, so that a plugin's kind is as good as one that was there when this module
    was imported; pydantic's own discriminated unions are closed once built.
    """

    families: tuple[Family, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_plain_validator_function(
            self._validate, serialization=core_schema.plain_serializer_function_ser_schema(_dump_kind)
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"x-open-union": list(self.families)}  # filled by regkit.schema, which knows the registry

    def _validate(self, value: Any, info: ValidationInfo) -> Kind:
        if isinstance(value, Kind):
            return self._of_family(value)
        registry = registry_of(info)
        try:
            options = shorthand.canonical(value, self.families, registry)
        except shorthand.KindError as error:
            provider = _provider(error.name, info) if isinstance(error, shorthand.UnknownKindError) else ""
            sentence = f"{error}{provider}"
            if isinstance(value, dict) and "kind" in value:
                raise mistakes_at([("kind", value["kind"], sentence)]) from None
            raise mistake(sentence) from None
        except shorthand.ShorthandError as error:
            raise mistake(str(error)) from None
        # A ValidationError of the kind's own class is merged by pydantic, under this field's place.
        return registry.kind(options["kind"], *self.families).model_validate(options, context=info.context)

    def _of_family(self, kind: Kind) -> Kind:
        """A kind that Python code has made: it need not be registered to be used, only to be saved."""
        if not any(isinstance(kind, CONTRACTS[family]) for family in self.families):
            raise mistake(f"{type(kind).__name__} is not a {' or '.join(self.families)}")
        return kind


def _dump_kind(kind: Kind) -> dict[str, Any]:
    """The options, without those that are null and would be if left out."""
    options = kind.model_dump(mode="json")
    fields = type(kind).model_fields
    return {name: value for name, value in options.items() if value is not None or fields[name].default is not None}


def _provider(name: str, info: ValidationInfo) -> str:
    """The sentence that says what to install, where the document was saved with the kind's provenance."""
    provenance = (info.context or {}).get("provenance")
    saved = provenance.get(name) if isinstance(provenance, dict) else None
    if not isinstance(saved, dict) or "distribution" not in saved:
        return ""
    distribution, version = saved["distribution"], saved.get("version")
    wanted = f"{distribution}=={version}" if version else distribution
    return f". The document was saved with it from {distribution} {version or ''}; try: pip install {wanted}"


AnyPenalty = Annotated[Kind, OpenUnion(("penalty", "activity penalty"))]
WeightPenalty = Annotated[Kind, OpenUnion(("penalty",))]
OutputPenalty = Annotated[Kind, OpenUnion(("activity penalty",))]
AnyConstraint = Annotated[Kind, OpenUnion(("constraint",))]
AnySchedule = Annotated[Kind, OpenUnion(("schedule",))]
