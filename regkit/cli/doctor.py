"""`regkit doctor`: the parts of an installation, and its problems."""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import Final

from torch.torch_version import TorchVersion

import regkit
from regkit import PluginError, Registry
from regkit.cli.layout import counted, fill, listed
from regkit.cli.plugin_warnings import plugin_warnings
from regkit.cli.plugins import overview, why
from regkit.registry.names import OWN
from regkit.registry.plugin import Plugin, installed, loaded
from regkit.registry.policy import Policy

_INTEGRATIONS: Final = ("lightning", "pytorch-lightning", "transformers", "accelerate", "skorch")
_REQUIREMENT: Final = re.compile(r"([\w.-]+)>=([\w.]+)(;?)")

_ENVIRONMENT: Final = {
    "REGKIT_PLUGINS": ("every plugin may be imported", "of plugins that are not regkit's own, only these are imported"),
    "REGKIT_DISABLE_PLUGINS": ("none is left out", "these are not imported"),
    "REGKIT_STRICT_PLUGINS": ("a broken plugin is a warning", "1 makes a broken plugin an error"),
}
"""The effect of each environment variable, where unset and where set."""


def doctor(_: argparse.Namespace) -> int:
    """Print the parts of an installation and its problems."""
    problems = list(_outdated())
    plugins: Sequence[Plugin] = ()
    with plugin_warnings(problems.append):
        try:
            plugins = Registry().plugins
        except PluginError as error:  # clashes, say; after an empty line there may be a traceback
            problems += str(error).partition("\n\n")[0].splitlines()
            plugins = list(_plugins_one_by_one())
    broken = [plugin for plugin in plugins if plugin.state == "broken"]
    problems += [plugin.reason for plugin in broken if not any(plugin.reason in problem for problem in problems)]
    if not any(plugin.origin.distribution == OWN for plugin in plugins):
        problems.append(f"regkit's own kinds are not there: {OWN} is not installed, or was not installed anew")
    states = Counter(plugin.state for plugin in plugins)
    blocked = [plugin for plugin in plugins if plugin.state == "blocked"]
    print("versions", listed(dict(_versions())), sep="\n", end="\n\n")
    print("environment", listed(dict(_environment())), sep="\n", end="\n\n")
    print("plugins:", ", ".join(f"{count} {state}" for state, count in states.items()) or "none")
    print(overview(plugins), *(fill(why(plugin), hang="  ") for plugin in blocked), sep="\n", end="\n\n")
    print(*(fill(f"problem: {problem}", hang="  ") for problem in problems), sep="\n", end="\n\n" if problems else "")
    print(f"{counted(len(problems), 'problem')} found" if problems else "no problems found")
    return 1 if problems else 0


def _plugins_one_by_one() -> Iterator[Plugin]:
    """The state of each plugin on its own, where no registry can be made of all plugins together."""
    try:
        policy = Policy.from_environment(None, ())
    except PluginError as error:  # and so nothing may be imported
        yield from (Plugin(origin, point.value, "blocked", str(error)) for point, origin in installed())
        return
    for point, origin in installed():
        verdict = policy.verdict(origin)
        yield loaded(point, origin)[0] if verdict is None else Plugin(origin, point.value, "blocked", verdict)


def _versions() -> Iterator[tuple[str, str]]:
    yield "python", f"{platform.python_version()}, {platform.python_implementation()}, {sys.executable}"
    yield "platform", platform.platform()
    yield OWN, f"{regkit.__version__}, {os.path.dirname(regkit.__file__)}"
    needed, _ = minimums()
    for name in (*sorted(needed), *_INTEGRATIONS):
        if (version := _version(name)) is not None:
            yield name, version


def _environment() -> Iterator[tuple[str, str]]:
    for name, (without, effect) in _ENVIRONMENT.items():
        value = os.environ.get(name, "")
        yield name, f"{value!r}: {effect}" if value else f"not set: {without}"


def _outdated() -> Iterator[str]:
    """A sentence for each distribution that is installed in another version than regkit needs."""
    if (recorded := _version(OWN)) not in (None, regkit.__version__):
        yield f"{OWN} {regkit.__version__} runs, where {recorded} was installed: install it anew"
    needed, wanted = minimums()
    for name in (*sorted(needed), *_INTEGRATIONS):
        version, minimum = _version(name), needed.get(name) or wanted.get(name)
        # torch brings the comparison along; regkit needs no more than that.
        if version is not None and minimum is not None and TorchVersion(version) < minimum:
            yield f"{name} {version} is installed, and regkit works with {minimum} or later"


def minimums() -> tuple[dict[str, str], dict[str, str]]:
    """The least versions that regkit's own metadata demands: always, and with one of the extras."""
    needed: dict[str, str] = {}
    wanted: dict[str, str] = {}
    for requirement in metadata.requires(OWN) or ():
        if match := _REQUIREMENT.match(requirement):
            name, minimum, conditional = match.groups()
            (wanted if conditional else needed).setdefault(name, minimum)
    return needed, wanted


def _version(distribution: str) -> str | None:
    """The version in the metadata of a distribution; nothing is imported."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
