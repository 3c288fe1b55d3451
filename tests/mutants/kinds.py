"""Penalties whose options or memory are wrong: what the laws of all kinds are to catch. Their value is a right one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import BeforeValidator, ConfigDict, Field, PrivateAttr, field_validator, model_validator
from torch import Tensor

from regkit import Penalty
from regkit.activity import at_least_float32
from regkit.fields import NonNegative, Positive
from tests.mutants.mutant import Mutants
from tests.support.versions import torch_before

MUTANTS = Mutants()


class Ridge(Penalty):
    """Σw², as it should be."""

    kind: Literal["ridge"] = "ridge"

    def value(self, w: Tensor) -> Tensor:
        return at_least_float32(w).square().sum()


@MUTANTS.caught_by("examples", "needs a classmethod `examples`", "low, high cannot be 1")
class ExamplesLeftOut(Ridge):
    """Options of which no two may be equal, and no example."""

    kind: Literal["banded"] = "banded"

    low: Positive
    """Where it begins."""

    high: Positive
    """Where it ends."""

    @model_validator(mode="after")
    def _ordered(self) -> ExamplesLeftOut:
        if self.low >= self.high:
            raise ValueError("low must be below high")
        return self


@MUTANTS.caught_by("examples", "examples() is empty")
class ExamplesEmpty(Ridge):
    """A list that is to be filled some day."""

    @classmethod
    def examples(cls) -> Sequence[ExamplesEmpty]:
        return []


@MUTANTS.caught_by("examples", "abstract", "value")
class ValueLeftOut(Penalty):
    """Nothing but a name."""

    kind: Literal["nameless"] = "nameless"


@MUTANTS.caught_by("named", "'My-Ridge'")
class NameMalformed(Ridge):
    """A name that is none."""

    kind: Literal["My-Ridge"] = "My-Ridge"


@MUTANTS.caught_by("named", "no kind may be named 'null'")
class NameReserved(Ridge):
    """A word of JSON, which the registry refuses."""

    kind: Literal["null"] = "null"


@MUTANTS.caught_by("documented", "no docstring under power, shift")
class OptionsUndocumented(Ridge):
    """Options that nobody can know the meaning of."""

    power: Positive = 2.0
    shift: NonNegative = 0.0


@MUTANTS.caught_by("documented", "ClassUndocumented has no docstring")
class ClassUndocumented(Ridge):
    kind: Literal["undocumented"] = "undocumented"


@MUTANTS.caught_by("described", "describe() gives '{\\n")
class DescribedOnManyLines(Ridge):
    """Its description is indented JSON."""

    def describe(self) -> str:
        return self.model_dump_json(indent=2)


@MUTANTS.caught_by("shorthand_fits", "shorthand names strenght; the options are strength")
class ShorthandMisspelt(Ridge):
    """A shorthand for an option that is written otherwise."""

    shorthand: ClassVar[tuple[str, ...]] = ("strenght",)


@MUTANTS.caught_by("survives_json", '"share":0.5} is read as', "share=0.005")
class ValidatorConverts(Ridge):
    """Percents in the document, which are divided by 100 once more whenever a saved document is read."""

    share: Positive = 50.0
    """A share, in percent. Range: > 0."""

    @field_validator("share")
    @classmethod
    def _of_one(cls, share: float) -> float:
        return share / 100

    @classmethod
    def examples(cls) -> Sequence[ValidatorConverts]:
        return [cls(strength=1.0, share=50.0)]


@MUTANTS.caught_by("survives_json", "unhashable", also="survives_copies")
class OptionIsAList(Ridge):
    """A list among the options cannot be hashed, and could be changed in place."""

    powers: list[float] = Field(default=[1.0, 2.0])
    """The powers. Range: > 0."""


@MUTANTS.caught_by("survives_json", "ValidationError", "powers")
class OptionIsAStrictTuple(Ridge):
    """A tuple, for which a document has a list."""

    powers: tuple[float, ...] = (1.0, 2.0)
    """The powers. Range: > 0."""


@MUTANTS.caught_by("survives_copies", "local object", also="survives_json compiles_whole")
class HoldsAFunction(Ridge):
    """A function in a private attribute, which cannot be pickled with the model."""

    _link: Callable[[Tensor], Tensor] = PrivateAttr(default_factory=lambda: lambda w: w.square())

    def value(self, w: Tensor) -> Tensor:
        return self._link(at_least_float32(w)).sum()


@MUTANTS.caught_by("frozen", "could be assigned")
class Thawed(Ridge):
    """Options that may be changed under way; that one be hashed, too, is lost with it."""

    model_config = ConfigDict(frozen=False)


@MUTANTS.caught_by("unknown_options_refused", "'an_option_of_no_kind' was taken")
class TakesAnything(Ridge):
    """Misspelt options pass."""

    model_config = ConfigDict(extra="ignore")


@MUTANTS.caught_by("numbers_strict", "the option power took '2.0'")
class TakesText(Ridge):
    """An option of its own making, which converts whatever it is given."""

    power: Annotated[float, BeforeValidator(float)] = 2.0
    """The power. Range: > 0."""


@MUTANTS.caught_by("numbers_strict", "the option floor took nan")
class TakesNaN(Ridge):
    """A type of option that is a number and no more."""

    model_config = ConfigDict(allow_inf_nan=True)

    floor: float = 0.0
    """The floor."""


# Dynamo could not set an attribute of a class before.
@MUTANTS.caught_by(
    "stateless",
    "its functions changed CountsOnTheClass.calls",
    also="compiles_whole" if torch_before("2.13") else "",
)
class CountsOnTheClass(Ridge):
    """How often it was asked, for all rules together."""

    calls: ClassVar[int] = 0

    def value(self, w: Tensor) -> Tensor:
        type(self).calls += 1
        return super().value(w)


@MUTANTS.caught_by("stateless", "self._seen", also="survives_json survives_copies compiles_whole")
class CountsInPrivate(Ridge):
    """A private attribute of a frozen class can be changed nevertheless."""

    _seen: int = PrivateAttr(0)

    def value(self, w: Tensor) -> Tensor:
        self._seen += 1
        return super().value(w)


@MUTANTS.caught_by("stateless", "its functions changed self.latest")
class Remembers(Ridge):
    """The latest value, for a report, written around what keeps the class frozen: it is that of any one weight."""

    def value(self, w: Tensor) -> Tensor:
        value = super().value(w)
        object.__setattr__(self, "latest", value.detach())
        return value


@MUTANTS.caught_by("stateless", "Cached._numbers", also="compiles_whole")
class Cached(Ridge):
    """A cache of what depends on the weight: it keeps each alive, and is stale once one has changed in place."""

    @cache  # noqa: B019  # the mistake
    def _numbers(self, w: Tensor) -> Tensor:
        return at_least_float32(w).square()

    def value(self, w: Tensor) -> Tensor:
        return self._numbers(w).sum()


@MUTANTS.caught_by(
    "deterministic", "asked twice", also="unit_strength list_forms_agree stays_on_its_device compiles_whole"
)
class NoiseOfItsOwn(Ridge):
    """A jitter against ties, from a generator that the machine seeds."""

    def value(self, w: Tensor) -> Tensor:
        generator = torch.Generator(w.device)
        generator.seed()
        return super().value(w + 1e-14 * torch.randn(w.shape, generator=generator, dtype=w.dtype))


@MUTANTS.caught_by(
    "draws_no_random_numbers",
    "generator of torch",
    also="deterministic unit_strength strides_do_not_matter gradient_is_that_of_autograd list_forms_agree "
    "gradient_is_the_slope_of_the_value compiles_whole halves_accumulate_in_float32",
)
class PowerIteration(Penalty):
    """The largest singular value by power iteration, from a random start: each value moves the whole run's numbers."""

    kind: Literal["spectral"] = "spectral"
    ranks: ClassVar[tuple[int, ...]] = (2,)

    def value(self, w: Tensor) -> Tensor:
        w = at_least_float32(w)
        u = torch.randn(w.size(1), dtype=w.dtype, device=w.device)
        for _ in range(3):
            u = torch.nn.functional.normalize(w.T @ (w @ u), dim=0)
        return (w @ u).square().sum()
