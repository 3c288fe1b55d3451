"""`regkit conformance`: the laws, tried on the kinds and adapters of a distribution."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from itertools import groupby
from typing import Final

from regkit import Adapter, PluginError, Registry
from regkit.cli.layout import as_json, fill
from regkit.cli.plugins import why
from regkit.errors import printable, unknown
from regkit.kinds import Kind
from regkit.registry.entries import canonical
from regkit.registry.plugin import Plugin, installed, loaded
from regkit.testing import Result, check_example, checks
from regkit.testing.hints import hints
from regkit.testing.laws import untried

_EXAMPLES: Final = "examples"
_WHY: Final = (
    "The laws are tried on what a plugin itself gives as examples. Write a classmethod `examples` of the kind, which "
    "returns kinds with options that make sense, or a method `examples` of the adapter, which returns a "
    "`regkit.Example(make, features)` for each class that it knows."
)


def conformance(options: argparse.Namespace) -> int:
    """Try the laws on the kinds and adapters that a distribution offers."""
    plugins = _plugins_named(options.distribution)
    trials = _Trials(options.law)
    results: list[Result] = []
    for subject, tried in groupby(trials.results(plugins), key=lambda result: result.subject):
        results += (of_subject := list(tried))
        if not options.json:
            print(_summary_of_subject(subject, of_subject), flush=True)
    if options.law and not results:
        raise PluginError(unknown("law", options.law, sorted(trials.laws)))
    if options.json:
        print(as_json([asdict(result) for result in results]))
    else:
        left = [*trials.skipped, *(why(plugin) for plugin in plugins if plugin.state != "loaded")]
        print(*(fill(f"hint: {hint}", hang="  ") for hint in trials.hints), sep="\n", end="\n" if trials.hints else "")
        print(*(fill(f"not tried: {reason}", hang="  ") for reason in left), sep="\n", end="\n" if left else "")
        print(_summary(results))
    broken = [plugin for plugin in plugins if plugin.state == "broken"]
    return 0 if results and not broken and all(result.passed for result in results) else 1


def _plugins_named(name: str) -> list[Plugin]:
    """The plugins of the distribution or entry point of this name. Raises PluginError where there is none."""
    plugins = Registry().plugins
    wanted = ":".join(map(canonical, name.split(":")))
    if found := [plugin for plugin in plugins if wanted in plugin.origin.names]:
        return found
    known = {plugin.origin.distribution for plugin in plugins} | {plugin.origin.point or "" for plugin in plugins}
    raise PluginError(unknown("distribution or entry point", name, sorted(known)))


class _Trials:
    """Trials of the laws, or of one law, on plugins one by one.

    law: the name of the only law to try; None: every law.
    laws: the names of all laws that could have been tried.
    skipped: the adapters that were not tried, each with the reason.
    hints: how kinds could be faster.
    """

    def __init__(self, law: str | None) -> None:
        self.law = law
        self.laws: set[str] = set()
        self.skipped: list[str] = []
        self.hints: list[str] = []

    def results(self, plugins: Sequence[Plugin]) -> Iterator[Result]:
        """The results, subject by subject."""
        origins = {plugin.origin for plugin in plugins if plugin.state == "loaded"}
        for point, origin in installed():
            if origin not in origins:
                continue
            _, offers = loaded(point, origin)
            for entry in offers.kinds:
                yield from self._of_kind(entry.kind)
            for adapter in {id(adapter): adapter for _, adapter in offers.adapters}.values():
                yield from self._of_adapter(adapter)

    def _of_kind(self, kind: type[Kind]) -> Iterator[Result]:
        try:
            found = list(checks(kind))
        except Exception as error:  # a stranger's `examples`: anything can come out
            yield _without_examples(kind.__qualname__, error)
            return
        self.laws |= {check.law.name for check in found}
        self.hints += [f"{kind.__qualname__}: {hint}" for hint in hints(kind) if self.law is None]
        wanted = (check for check in found if self.law in (None, check.law.name))
        yield from (check.law.tried(check.subject, check.title) for check in wanted)

    def _of_adapter(self, adapter: Adapter) -> Iterator[Result]:
        name = type(adapter).__name__
        if absent := _missing_packages(adapter):
            self.skipped.append(f"{name}, since {' and '.join(absent)} cannot be found")
            return
        try:
            examples = list(adapter.examples())
            if not examples:
                raise ValueError("examples() is empty")
            reports = [check_example(adapter, example) for example in examples]
        except Exception as error:  # as above
            yield _without_examples(name, error)
            return
        for result in (result for report in reports for result in report):
            self.laws.add(result.law)
            if self.law in (None, result.law):
                yield result


def _without_examples(subject: str, error: Exception) -> Result:
    return Result(subject, _EXAMPLES, False, f"{type(error).__name__}: {error}", _WHY)


def _missing_packages(adapter: Adapter) -> list[str]:
    """The packages of an adapter's modules, if none of these packages is installed."""
    known = [one.partition(":")[0].partition(".")[0] if isinstance(one, str) else None for one in adapter.modules]
    absent = sorted({package for package in known if package is not None and find_spec(package) is None})
    return absent if set(known) == set(absent) else []


def _summary_of_subject(subject: str, results: Sequence[Result]) -> str:
    count, held = len(results), sum(result.passed for result in results)
    lines = [f"{printable(subject)}: {held} of {count} {'law holds' if count == 1 else 'laws hold'}"]
    for failure in (result for result in results if not result.passed and not result.untried):
        lines += [fill(f"FAILED {failure.law}: {failure.seen}", "  ", "  "), fill(failure.why, "    ")]
    lines += [fill(sentence, "  ", "  ") for sentence in untried(results)]
    return "\n".join(lines)


def _summary(results: Sequence[Result]) -> str:
    failed = sum(not result.passed for result in results)
    if not results:
        return "nothing was tried"
    return f"{failed} of {len(results)} laws do not hold" if failed else f"all {len(results)} laws hold"
