"""The candidates for a rule's sites. Each fact about a candidate is found out once, however many rules ask."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, Final

from torch import nn

from regkit.adapters import Output, OutputSite, Weight, WeightSite
from regkit.errors import hint, listing, spend_hint
from regkit.plan.declarations import Outline, outline, outputs_of, weights_of
from regkit.plan.modules import RecurrentModule, named_modules
from regkit.plan.patterns import glob, literal
from regkit.vocabulary import in_these_words


@dataclass(eq=False, slots=True)
class WeightCandidate:
    """A weight of a recurrent module."""

    recurrent: RecurrentModule
    weight: Weight
    _outline: Outline | None = None
    _sites: dict[str | None, WeightSite] = field(default_factory=dict)

    @property
    def paired(self) -> bool:
        """Whether the weight is two biases, of which the sum acts."""
        return len(self.weight.parameters) > 1

    @property
    def outline(self) -> Outline:
        """The outline of the weight. Raises AttachError and PluginError as `regkit.plan.declarations.outline`."""
        if self._outline is None:
            self._outline = outline(self.recurrent, self.weight)
        return self._outline

    def site(self, gate: str | None) -> WeightSite:
        """The site of one gate of the weight, or of the whole weight."""
        if gate not in self._sites:
            units, *others = self.outline.shape
            gates = len(self.weight.gates) or 1
            rows, index = (units, 0) if gate is None else (units // gates, self.weight.gates.index(gate))
            self._sites[gate] = WeightSite(
                **_fields(self.recurrent, _OF_THE_MODULE),
                **_fields(self.weight, _OF_THE_WEIGHT),
                gate=gate,
                gates=gates if gate is None else 1,
                start=index * rows,
                rows=rows,
                units=units,
                shape=(rows, *others),
            )
        return self._sites[gate]

    def part(self, site: WeightSite) -> Hashable:
        """A key that is equal for sites of one part of a tied weight, and only there."""
        return (*self.outline.identity, *site.part)


@dataclass(eq=False, slots=True)
class OutputCandidate:
    """An output of a recurrent module."""

    recurrent: RecurrentModule
    output: Output
    _sites: dict[tuple[object, object], OutputSite] = field(default_factory=dict)

    def site(self, layers: Collection[int] | None, directions: Collection[str] | None) -> OutputSite:
        """The site of the output in the wanted layers and directions, None meaning all."""
        if (layers, directions) not in self._sites:
            output = self.output
            self._sites[layers, directions] = OutputSite(
                **_fields(self.recurrent, _OF_THE_MODULE),
                role=output.role,
                layers=tuple(layer for layer in output.layers if layer in (layers or output.layers)),
                directions=tuple(one for one in output.directions if one in (directions or output.directions)),
            )
        return self._sites[layers, directions]


def _bare(pattern: str) -> str:
    """A pattern without the prefixes that wrappers of a whole model give to names."""
    parts = [part for part in pattern.split(".") if part != "_orig_mod"]
    while parts[:1] == ["module"]:
        del parts[0]
    return ".".join(parts)


_OF_THE_MODULE: Final = ("path", "name", "module_class")
_OF_THE_WEIGHT: Final = ("parameters", "role", "layer", "direction", "transposed", "columns", "through", "mask")


def _fields(source: RecurrentModule | Weight, names: Sequence[str]) -> dict[str, Any]:
    """The fields that a site takes from its module or its weight."""
    return {name: getattr(source, name) for name in names}


@dataclass(eq=False)
class ModuleCandidate:
    """A recurrent module under one of its names. Raises PluginError where its adapter breaks the contract."""

    recurrent: RecurrentModule

    @cached_property
    def outputs(self) -> list[OutputCandidate]:
        """The outputs of the module."""
        return [OutputCandidate(self.recurrent, output) for output in outputs_of(self.recurrent)]

    @cached_property
    def _weights(self) -> list[WeightCandidate]:
        return [WeightCandidate(self.recurrent, weight) for weight in weights_of(self.recurrent)]

    @cached_property
    def each(self) -> list[WeightCandidate]:
        """The weights of the module, with each bias on its own."""
        return [one for one in self._weights if not one.paired]

    @cached_property
    def effective(self) -> list[WeightCandidate]:
        """The weights of the module, with a pair of biases as one weight where the adapter declares their sum."""
        summed = {name for one in self._weights if one.paired for name in one.weight.parameters}
        return [one for one in self._weights if one.paired or one.weight.parameters[0] not in summed]

    @cached_property
    def uncovered(self) -> tuple[str, ...]:
        """The names of the module's own parameters that no weight of the adapter is kept in, nor ignored."""
        named = list(_own_parameters(self.recurrent.module))
        plain = self.recurrent.module._parameters
        names = {name for one in self._weights for name in one.weight.parameters}
        kept = names | {f"{name}{made}" for name in names if plain.get(name) is None for made in _KEPT_AS}
        kept |= {one.weight.mask or "" for one in self._weights}
        covered = {id(parameter) for name, parameter in named if name in kept}
        left = dict.fromkeys(name for name, parameter in named if id(parameter) not in covered)
        ignored = self.recurrent.adapter.ignored
        return tuple(name for name in left if not any(fnmatchcase(name, pattern) for pattern in ignored))


_KEPT_AS: Final = ("_raw", "_orig", "_g", "_v")
"""What is added to a weight's name where the weight is computed: by dropping, pruning, or the former weight norm."""


def _own_parameters(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that a module keeps itself, in lists, in dicts, or as the originals of a parametrized one.

    Each comes with its name, an original with that of the parametrized parameter.
    """
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield f"{prefix}{name}", parameter
    for name, child in module._modules.items():
        if name == "parametrizations" and isinstance(child, nn.ModuleDict):
            yield from ((f"{prefix}{one}", p) for one, of in child.items() for p in of.parameters())
        elif isinstance(child, (nn.ParameterList, nn.ParameterDict)):
            yield from _own_parameters(child, f"{prefix}{name}.")


class Candidates:
    """The recurrent modules of a model, in the model's order, under all their names."""

    def __init__(self, recurrents: Sequence[RecurrentModule], model: nn.Module) -> None:
        self._model = model
        self._all = [ModuleCandidate(one) for one in recurrents]
        self._numbers_by_name: dict[str, list[int]] = {}
        self._numbers_by_path: dict[str, list[int]] = {}
        for number, one in enumerate(recurrents):
            self._numbers_by_name.setdefault(one.name, []).append(number)
            self._numbers_by_path.setdefault(one.path, []).append(number)
        self._names_by_part: dict[str, list[str]] = {}
        for name in self._numbers_by_name:
            for part in dict.fromkeys(name.split(".")):
                self._names_by_part.setdefault(part, []).append(name)
        self._numbers_by_glob: dict[str, list[int]] = {}

    @property
    def modules(self) -> list[RecurrentModule]:
        """Every module once, under the first of its names."""
        return [candidate.recurrent for candidate in self._first(range(len(self._all)))]

    @cached_property
    def words(self) -> tuple[list[str], list[str]]:
        """The roles and the gates of the model's modules."""
        weights = [one.weight for candidate in self._all for one in candidate._weights]
        put_out = [one.output.role for candidate in self._all for one in candidate.outputs]
        roles = dict.fromkeys([*(one.role for one in weights), *put_out])
        return list(roles), list(dict.fromkeys(gate for one in weights for gate in one.gates))

    def unmatched(self, pattern: str) -> str:
        """The sentence on a pattern that covers no recurrent module: which thing has that name, or the nearest name."""
        available = f"Available: {listing(map(str, self.modules))}"
        if sentence := self._described(pattern):
            spend_hint()
            return f"{sentence}. {available}"
        names, last = [one.name for one in self.modules if one.name], f".{pattern.rpartition('.')[2]}"
        if alike := next((name for name in names if name.endswith(last)), None):
            spend_hint()
            return f"no recurrent module is named {pattern!r}; did you mean {alike!r}? {available}"
        return f"no recurrent module is named {pattern!r}{hint(_bare(pattern), names)} {available}"

    def _described(self, pattern: str) -> str | None:
        """The sentence on a class, a parameter or another module that a pattern names; None where there is none."""
        modules = {name: type(module).__name__ for _, name, module in named_modules(self._model)}
        of_class = pattern.removeprefix("torch.").removeprefix("nn.")
        if pattern not in modules and of_class in modules.values():
            named = [one.name or "the model itself" for one in self.modules if one.module_class == of_class]
            of = f"modules are chosen by name: {listing(named)}" if named else "of no module that an adapter knows"
            return f"{pattern!r} is a class, and {of}"
        if cls := modules.get(pattern):
            around = next((one for one in self.modules if pattern.startswith(f"{one.name}.")), None)
            rest = (
                "no recurrent module that an adapter knows" if around is None else f"a part of {around}, which has all"
            )
            return f"{pattern!r} is a {cls}, and {rest}"
        if sentence := in_these_words("module", pattern):
            return f"{pattern!r} is a parameter: {sentence}"
        return None

    def covers(self, pattern: str) -> bool:
        """Whether a pattern covers any module."""
        return bool(self._numbers(pattern))

    def has(self, pattern: str, modules: Collection[int]) -> bool:
        """Whether a pattern covers any of the modules with these ids."""
        return any(id(self._all[number].recurrent.module) in modules for number in self._numbers(pattern))

    def chosen(self, patterns: Sequence[str]) -> list[ModuleCandidate]:
        """Every module that any of the patterns covers, under the first of its names that is covered."""
        return self._first(sorted({number for pattern in patterns for number in self._numbers(pattern)}))

    def _first(self, numbers: Sequence[int]) -> list[ModuleCandidate]:
        found: dict[int, ModuleCandidate] = {}
        for number in numbers:
            candidate = self._all[number]
            found.setdefault(id(candidate.recurrent.module), candidate)
        return list(found.values())

    def _numbers(self, pattern: str) -> list[int]:
        """The numbers of the candidates that a pattern covers, as written or else without wrappers' prefixes."""
        if numbers := self._covered(pattern) or self._numbers_by_path.get(pattern):
            return numbers
        bare = _bare(pattern)
        return self._covered(bare) if bare != pattern else []

    def _covered(self, pattern: str) -> list[int]:
        """The numbers of the candidates that a pattern covers. A pattern is matched with a name once at most."""
        if literal(pattern):
            return self._numbers_by_name.get(pattern, [])
        if pattern not in self._numbers_by_glob:
            # A name must have every literal part of the pattern: only names with the rarest part are matched.
            parts = filter(literal, pattern.split("."))
            names = min((self._names_by_part.get(part, []) for part in parts), key=len, default=self._numbers_by_name)
            covered = filter(glob(pattern), names)
            self._numbers_by_glob[pattern] = [number for name in covered for number in self._numbers_by_name[name]]
        return self._numbers_by_glob[pattern]
