"""The places that rules choose from. What there is to know of one is found out once, however many rules ask."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from regkit.adapters import Output, OutputSite, Weight, WeightSite
from regkit.plan.declarations import Outline, outline, outputs_of, weights_of
from regkit.plan.modules import RecurrentModule
from regkit.plan.patterns import glob, literal


@dataclass(eq=False, slots=True)
class WeightCandidate:
    """A weight of a recurrent module."""

    recurrent: RecurrentModule
    weight: Weight
    _outline: Outline | None = None
    _sites: dict[str | None, WeightSite] = field(default_factory=dict)

    @property
    def paired(self) -> bool:
        """Whether it is two biases, of which the sum acts."""
        return len(self.weight.parameters) > 1

    @property
    def outline(self) -> Outline:
        """Its outline. Raises AttachError and PluginError as `regkit.plan.declarations.outline`."""
        if self._outline is None:
            self._outline = outline(self.recurrent, self.weight)
        return self._outline

    def site(self, gate: str | None) -> WeightSite:
        """The site of one of its gates, or of all of it."""
        if gate not in self._sites:
            self._sites[gate] = self._site(gate)
        return self._sites[gate]

    def _site(self, gate: str | None) -> WeightSite:
        r, w, (units, *others) = self.recurrent, self.weight, self.outline.shape
        gates = len(w.gates) or 1
        rows, index = (units, 0) if gate is None else (units // gates, w.gates.index(gate))
        return WeightSite(
            r.path, r.name, r.module_class, w.parameters, w.role, w.layer, w.direction, gate,
            index * rows, rows, gates if gate is None else 1, (rows, *others), units,
            w.transposed, w.columns, w.through, w.mask,
        )  # fmt: skip

    def part(self, site: WeightSite) -> Hashable:
        """Equal for sites of one part of a tied weight, and only there."""
        return (*self.outline.identity, *site.part)


@dataclass(eq=False, slots=True)
class OutputCandidate:
    """Something that a recurrent module puts out."""

    recurrent: RecurrentModule
    output: Output
    _sites: dict[tuple[object, object], OutputSite] = field(default_factory=dict)

    def site(self, layers: Collection[int] | None, directions: Collection[str] | None) -> OutputSite:
        """The site of those of its layers and directions that are wanted; None: of all."""
        if (layers, directions) not in self._sites:
            self._sites[layers, directions] = self._site(layers, directions)
        return self._sites[layers, directions]

    def _site(self, layers: Collection[int] | None, directions: Collection[str] | None) -> OutputSite:
        r, o = self.recurrent, self.output
        mine = tuple(layer for layer in o.layers if layer in (layers or o.layers))
        ways = tuple(direction for direction in o.directions if direction in (directions or o.directions))
        return OutputSite(r.path, r.name, r.module_class, o.role, mine, ways)


@dataclass(eq=False)
class ModuleCandidate:
    """A recurrent module under one of its names. What its adapter does wrong is raised, as by `declarations`."""

    recurrent: RecurrentModule

    @cached_property
    def outputs(self) -> list[OutputCandidate]:
        """Everything that it puts out."""
        return [OutputCandidate(self.recurrent, output) for output in outputs_of(self.recurrent)]

    @cached_property
    def _weights(self) -> list[WeightCandidate]:
        return [WeightCandidate(self.recurrent, weight) for weight in weights_of(self.recurrent)]

    @cached_property
    def each(self) -> list[WeightCandidate]:
        """Its weights, each bias on its own."""
        return [one for one in self._weights if not one.paired]

    @cached_property
    def effective(self) -> list[WeightCandidate]:
        """Its weights, biases in a sum where there is one."""
        summed = {name for one in self._weights if one.paired for name in one.weight.parameters}
        return [one for one in self._weights if one.paired or one.weight.parameters[0] not in summed]


class Candidates:
    """The recurrent modules of a model, in its order, under all their names."""

    def __init__(self, recurrents: Sequence[RecurrentModule]) -> None:
        self._all = [ModuleCandidate(one) for one in recurrents]
        self._named: dict[str, list[int]] = {}
        for number, one in enumerate(recurrents):
            self._named.setdefault(one.name, []).append(number)
        self._with: dict[str, list[str]] = {}
        for name in self._named:
            for part in dict.fromkeys(name.split(".")):
                self._with.setdefault(part, []).append(name)
        self._covered: dict[str, list[int]] = {}

    @property
    def modules(self) -> list[RecurrentModule]:
        """Each module, under the first of its names."""
        return [place.recurrent for place in self._first(range(len(self._all)))]

    def covers(self, pattern: str) -> bool:
        """Whether a pattern covers any."""
        return bool(self._numbers(pattern))

    def has(self, pattern: str, modules: Collection[int]) -> bool:
        """Whether a pattern covers any of the modules of these ids."""
        return any(id(self._all[number].recurrent.module) in modules for number in self._numbers(pattern))

    def chosen(self, patterns: Sequence[str]) -> list[ModuleCandidate]:
        """Each module that any of the patterns covers, under the first of its names that one does."""
        return self._first(sorted({number for pattern in patterns for number in self._numbers(pattern)}))

    def _first(self, numbers: Sequence[int]) -> list[ModuleCandidate]:
        found: dict[int, ModuleCandidate] = {}
        for number in numbers:
            place = self._all[number]
            found.setdefault(id(place.recurrent.module), place)
        return list(found.values())

    def _numbers(self, pattern: str) -> list[int]:
        """The numbers of those under names that a pattern covers. A pattern is matched with a name once at most."""
        if literal(pattern):
            return self._named.get(pattern, [])
        if pattern not in self._covered:
            parts = filter(literal, pattern.split("."))  # which a name must have: those of the rarest are looked at
            names = min((self._with.get(part, []) for part in parts), key=len, default=self._named)
            self._covered[pattern] = [n for name in filter(glob(pattern), names) for n in self._named[name]]
        return self._covered[pattern]
