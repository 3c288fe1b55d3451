"""The base of kinds: frozen options, a name, a manual; and of kinds with a strength."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from regkit import _pickled
from regkit.errors import PluginError
from regkit.fields import NonNegative

Via = Literal["gradient", "loss", "proximal", "decoupled", "inject"]
"""The way of a penalty: added to the gradient at the step, or to the loss; by the proximal operator after the step; as
a decoupled decay, as in AdamW. An activity penalty is added to the loss, or to the gradient of the outputs (inject).
"""


class Kind(BaseModel):
    """The base of all kinds: frozen options, a name, a manual.

    >>> regkit.load({"rules": [{"penalty": "l2(0.1)"}]}).rules[0].penalty.describe()
    'l2(strength=0.1)'
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )
    kind: str
    __reduce_ex__ = _pickled.reduce_kind

    shorthand: ClassVar[tuple[str, ...]] = ()
    """The options that `"name(1, 2)"` fills, in order."""

    @classmethod
    def kind_name(cls) -> str:
        """The name in the class' field `kind: Literal[...]`. Raises PluginError where there is no name."""
        names = get_args(cls.model_fields["kind"].annotation)
        if len(names) != 1 or not isinstance(names[0], str):
            raise PluginError(f"{cls.__module__}.{cls.__qualname__} needs a field `kind: Literal['its_name']`")
        return names[0]

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Let Python code leave out the name that the class already says: `L2(strength=1e-4)`."""
        field = cls.model_fields["kind"]
        names = get_args(field.annotation)
        if field.is_required() and len(names) == 1:
            field.default = names[0]
            cls.model_rebuild(force=True)

    def inert(self) -> str | None:
        """The reason why these options have no effect, or None. A rule without effect is refused."""
        return None

    @classmethod
    def examples(cls) -> Sequence[Kind]:
        """Kinds of this class with sensible options: `regkit kinds NAME` shows the first, the laws try each.

        The default is one kind, in which all options without a default are 1. Raises PluginError where that is invalid.
        """
        needed = [name for name, option in cls.model_fields.items() if name != "kind" and option.is_required()]
        try:
            return (cls.model_validate(dict.fromkeys(needed, 1)),)
        except ValidationError as error:
            raise PluginError(
                f"{cls.__module__}.{cls.__qualname__} needs a classmethod `examples`, which returns kinds with options "
                f"that make sense: {', '.join(needed)} cannot be 1"
            ) from error

    def describe(self) -> str:
        """The kind and its options on one line: `l2(strength=0.0001)`."""
        options = self.model_dump(exclude={"kind"}, exclude_none=True)
        return f"{self.kind}({', '.join(f'{key}={value}' for key, value in options.items())})"


class _Strong(Kind):
    """A kind with a strength."""

    shorthand: ClassVar[tuple[str, ...]] = ("strength",)

    signed: ClassVar[bool] = False
    """Whether values may be negative, as of an entropy. The laws of `regkit.testing` hold all other kinds to ≥ 0."""

    strength: NonNegative
    """What the unit value is multiplied by, times the schedule's factor. Range: ≥ 0; a rule with 0 is refused."""

    def inert(self) -> str | None:
        return "its strength is 0" if self.strength == 0 else None
