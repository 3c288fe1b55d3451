"""The one module that pickles of regkit name: `read`, with a format number, a word, and plain values.

A model that was pickled, or saved whole by `torch.save`, names the modules of its classes; once a module has moved,
such a model cannot be loaded. So everything of regkit that a pickle may hold is written here, and read here. The path
of this module, the name `read` and every word that was ever written stay for ever; the classes and modules behind the
words may be renamed; where fields are renamed, the old names are read too. A change of the written values raises
`FORMAT`; older formats are still read. `tests/support/pickles` holds such pickles.

An installed kind is its name and its options, as in a document. A kind that no installed plugin offers is pickled as
the class that its author gave it, which names its author's module.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from regkit.attachment.copies import ModelCompanion
    from regkit.kinds import Kind
    from regkit.plan.plan import Plan
    from regkit.registry.registry import Registry

FORMAT: Final = 1
"""The format that is written, and the newest that is read."""

Call = tuple[Any, ...]
"""A result of `__reduce__`: a function and its arguments."""


def read(format: int, word: str, *values: Any) -> Any:
    """The object that was written under a word. Raises RegkitError for a format that only a newer regkit reads."""
    from regkit.errors import RegkitError

    if format > FORMAT:
        raise RegkitError(
            f"this was pickled in format {format} of regkit's pickles, and the regkit that is installed here reads "
            f"formats up to {FORMAT}: it takes a newer torch-regkit to load it"
        )
    if word in _READERS:
        return _READERS[word](*values)
    made = _classes()[word]
    return getattr(made, "model_construct", made)(**values[0])  # unchecked: its roles and gates may be unknown here


def call(word: str, *values: Any) -> Call:
    """The call of `read` that makes an object anew."""
    return read, (FORMAT, word, *values)


# --- values of which a document and a plan are made ------------------------------------------------------------------


@cache
def _classes() -> dict[str, type]:
    """The classes that are written as their fields, by their words in pickles."""
    from regkit import adapters, sites
    from regkit.document import context, spec, target

    return {
        "spec": spec.Spec,
        "rule": spec.Rule,
        "layer": spec.Layer,
        "provenance": spec.Provenance,
        "target": target.Target,
        "missing kind": context.MissingKind,
        "weight": adapters.Weight,
        "output": adapters.Output,
        "weight site": sites.WeightSite,
        "output site": sites.OutputSite,
        "example": adapters.Example,
    }


def reduce_value(value: Any, protocol: Any) -> Call | str:
    """`__reduce_ex__` of a class that is written as its fields; other subclasses are pickled as Python does."""
    word = next((word for word, made in _classes().items() if made is type(value)), None)
    return object.__reduce_ex__(value, protocol) if word is None else call(word, dict(value.__dict__))


def reduce_kind(kind: Kind, protocol: Any) -> Call | str:
    """`__reduce_ex__` of a kind: for an installed kind its name, its options as JSON and its distribution."""
    from regkit.registry.names import OWN
    from regkit.registry.registry import default

    entry = default().find(kind.kind)
    if entry is None or not entry.origin.installed or not entry.made(kind):
        return reduce_value(kind, protocol)
    origin = entry.origin
    version = () if origin.distribution == OWN else (origin.distribution, origin.version)
    return call("kind", kind.kind, kind.model_dump_json(), *version)


def _kind(name: str, options: str, distribution: str | None = None, version: str | None = None) -> Kind:
    from regkit.errors import PluginError, unknown
    from regkit.registry.entries import canonical
    from regkit.registry.registry import default

    registry = default()
    entry = registry.find(name)
    if entry is None:
        sentence = unknown("kind", name, [one.name for one in registry.entries()])
        raise PluginError(sentence + registry.absence(name, distribution, version))
    if distribution is not None and canonical(distribution) != canonical(entry.origin.distribution):
        raise PluginError(f"{name!r} was pickled from {distribution}; here it is another kind, of {entry.origin}")
    return entry.kind.model_validate_json(options)


# --- the plan and the registry ---------------------------------------------------------------------------------------


def reduce_plan(plan: Plan) -> Call:
    """`__reduce__` of a plan: each rule as a dict, and the registry if adapters are needed again.

    Only outputs need their adapters, and a registry of one's own may hold what cannot be pickled.
    """
    outputs = any(binding.outputs for binding in plan.bindings)
    return call("plan", [dict(binding.__dict__) for binding in plan.bindings], plan.registry if outputs else None)


def _plan(bindings: list[dict[str, Any]], registry: Registry | None) -> Plan:
    from regkit.plan.binding import Binding
    from regkit.plan.plan import Plan
    from regkit.registry.registry import default

    for binding in bindings:
        kind = binding["kind"]
        entry = default().find(kind.kind)
        if entry is not None and entry.made(kind):  # or a plan from before an upgrade would differ from one after it
            binding["origin"] = str(entry.origin)
    return Plan(tuple(Binding(**binding) for binding in bindings), registry or default())


def reduce_registry(registry: Registry) -> Call:
    """`__reduce__` of a registry: the names of installed plugins, and the plugins registered in this process."""
    from regkit.registry import registry as room
    from regkit.registry.entries import full_name

    if registry is room._default:
        return call("registry")
    plugins = [{**vars(one), "origin": vars(one.origin)} for one in registry._plugins]
    kinds = [
        (name, None if one.origin.installed else (one.family, one.kind, one.origin.distribution))
        for name, one in registry._kinds.items()
    ]
    adapters = [
        (full_name(known), None) if origin.installed else (known, (adapter, origin.distribution))
        for known, (adapter, origin) in registry._adapters.items()
    ]
    return call("registry", plugins, kinds, adapters)


def _registry(*tables: Any) -> Registry:
    from regkit.registry.entries import Entry, Origin, full_name
    from regkit.registry.plugin import Plugin
    from regkit.registry.registry import Registry, default

    here = default()
    if not tables:
        return here
    plugins, kinds, adapters = tables
    found = Registry(entry_points=False)
    found._plugins = tuple(Plugin(**{**one, "origin": Origin(**one["origin"])}) for one in plugins)
    for name, own in kinds:
        entry = here.find(name) if own is None else Entry(own[0], name, own[1], Origin(own[2]))
        if entry is not None:
            found._kinds[name] = entry
    classes = {full_name(known): known for known in here._adapters}
    for known, own in adapters:
        if own is not None:
            found._adapters[known] = own[0], Origin(own[1])
        elif known in classes:
            found._adapters[classes[known]] = here._adapters[classes[known]]
    return found


# --- companions and hooks, which models carry ------------------------------------------------------------------------


def _companion() -> ModelCompanion:
    from regkit.attachment.attaching import attach_copy
    from regkit.attachment.copies import ModelCompanion

    companion = object.__new__(ModelCompanion)
    companion._attach = attach_copy
    return companion


def _inert_hook(of: str, number: int) -> Any:
    from regkit.engine import watchdog
    from regkit.recording import recorder, witness
    from regkit.runtime import optimizer_hooks

    optimizer_hooks.keep_clear(number)
    return {"recorder": recorder.Recorder, "watch": watchdog._Hook, "witness": witness.Witness}[of]()


_READERS: Final[dict[str, Callable[..., Any]]] = {
    "companion": _companion,
    "hook": _inert_hook,
    "kind": _kind,
    "plan": _plan,
    "registry": _registry,
}
