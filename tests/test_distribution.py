"""regkit is installed as `torch-regkit`: nothing leads to the stranger's distribution that PyPI has under `regkit`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

import regkit
from regkit import Registry
from regkit.cli.scaffold import TEMPLATES, scaffold
from tests.support.plugins.distributions import environment, install, run, wheel
from tests.support.plugins.installing import PLUGIN

ROOT = Path(__file__).parents[1]
SUFFIXES = {"", ".cfg", ".ini", ".json", ".md", ".py", ".sh", ".tmpl", ".toml", ".txt", ".yaml", ".yml"}
STRANGER = "regkit"
ASKS_FOR_IT = re.compile(
    rf"""
    \b(install|uv\ add|poetry\ add|pdm\ add)(\s+-\S+|\s+\S+\.txt)*\s+["'`]?{STRANGER}(?![\w-])  # a command
    | (?<![\w.-]){STRANGER}\[                                                                   # its extras
    | (?<![\w.-]){STRANGER}\s?([=~!<>]=|[<>])\s?["'`]?[\d$*{{]                                  # its versions
    | /(project|simple)/{STRANGER}(?![\w-])                                                     # its page
    | ^name\s*=\s*["']{STRANGER}["']                                                            # its name, taken
    """,
    re.VERBOSE,
)
METADATA = """
import json, sys
from importlib import metadata
import regkit
print(json.dumps([regkit.__file__, *(metadata.metadata(name).json for name in sys.argv[1:])]))
"""


def texts() -> Iterator[Path]:
    """The files of text of the repository, without environments and the caches of tools."""
    left_out = {".git", "site", "build", "dist", *(path.parent.name for path in ROOT.glob("*/pyvenv.cfg"))}
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        kept = not left_out.intersection(parts) and not any(part.endswith("cache") for part in parts)
        if kept and path.is_file() and path.suffix in SUFFIXES:
            yield path


def test_no_file_of_the_repository_asks_for_the_strangers_distribution():
    paths = list(texts())
    assert {ROOT / "pyproject.toml", ROOT / "README.md", ROOT / ".ci/run", Path(__file__)} < set(paths)
    lines = [(path, line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(path.relative_to(ROOT).as_posix(), line) for path, line in lines if ASKS_FOR_IT.search(line)] == []


@pytest.mark.parametrize(
    ("before", "after", "asks"),
    [
        ("pip install ", "", True),
        ("pip install -q -c constraints.txt '", "'", True),
        ("- run: python -m pip install `", "`.", True),
        ("uv add ", " && ls", True),
        ('test = ["', '[examples]"]', True),
        ('dependencies = ["', '>=0.1.0", "torch>=2.8"]', True),
        ("", "==0.1.0", True),
        ('f"', '=={version}"', True),
        ("https://pypi.org/project/", "/", True),
        ('name = "', '"', True),
        ("pip install torch-", "", False),
        ("pip install ", "-nuclear", False),
        ('pip install -e ".[dev]" && ', " doctor", False),
        ('dependencies = ["torch-', '>=0.1.0", "torch>=2.8"]', False),
        ("https://pypi.org/project/torch-", "/", False),
        ("from ", "_standard import norms", False),
        ('keywords = ["', '", "pytorch"]', False),
    ],
)
def test_what_asks_for_the_strangers_distribution_is_told_from_what_does_not(before, after, asks):
    assert bool(ASKS_FOR_IT.search(before + STRANGER + after)) == asks


@pytest.mark.parametrize("family", [*TEMPLATES, "the example"])
def test_a_plugin_depends_on_torch_regkit(family, tmp_path):
    folder = ROOT / "examples/third_party_plugin"
    if family in TEMPLATES:
        scaffold("regkit-mine", family, folder := tmp_path / "mine")
    (needed,) = re.findall(r"^dependencies = (.*)$", (folder / "pyproject.toml").read_text(), re.MULTILINE)
    assert json.loads(needed) == [f"torch-regkit>={regkit.__version__}", "torch>=2.8"]


@pytest.mark.slow
def test_a_plugin_installs_against_the_wheel_of_torch_regkit(tmp_path, monkeypatch):
    """Its requirements are resolved, without an index: a wrong name would find nothing."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    scaffold("regkit-mine", "penalty", tmp_path / "mine")
    python = environment(tmp_path / "fresh")
    install(python, "--ignore-installed", "--no-deps", wheel(ROOT, tmp_path / "wheels"))
    install(python, wheel(tmp_path / "mine", tmp_path / "wheels"))
    told = run(python, "-c", METADATA, "torch-regkit", "regkit-mine", cwd=tmp_path)
    place, own, mine = json.loads(told)
    assert Path(place).is_relative_to(tmp_path / "fresh")
    assert (own["name"], own["version"]) == ("torch-regkit", regkit.__version__)
    assert mine["requires_dist"][:2] == [f"torch-regkit>={regkit.__version__}", "torch>=2.8"]
    for word in ("Keras", "RNN", "LSTM", "GRU"):
        assert word in own["summary"]
        assert word.lower() in " ".join(own["keywords"])
    assert own["project_url"] == ["Homepage, https://pypi.org/project/torch-regkit/"]
    assert "No broken requirements found" in run(python, "-m", "pip", "check", cwd=tmp_path)
    shown = run(python, "-m", "regkit", "plugins", "--requirements", cwd=tmp_path).splitlines()
    assert shown == ["regkit-mine==0.1.0", f"torch-regkit=={regkit.__version__}"]


def test_a_document_that_was_saved_under_the_former_name_loads_and_is_saved_under_the_current_one():
    spec = regkit.load({"rules": [{"penalty": "l2(1)"}]})
    saved = spec.to_json()
    for former in ("regkit", "Regkit"):
        old = saved.replace('"torch-regkit"', f'"{former}"')
        assert old != saved
        assert regkit.load(old) == regkit.load(old, strict=True) == spec
        assert regkit.load(old, strict=True).to_json() == saved
    with pytest.raises(regkit.SpecError, match=r"'l2' was saved from torch-regkit 0\.0\.1; installed is torch-regkit "):
        regkit.load(old.replace(regkit.__version__, "0.0.1"), strict=True)


def test_a_kind_that_came_with_the_former_name_is_looked_for_in_torch_regkit():
    old = {"provenance": {"lost": {"distribution": "regkit", "version": "9"}}, "rules": [{"penalty": "lost(1)"}]}
    with pytest.raises(regkit.SpecError, match=r"torch-regkit \S+ is installed, .*; try: pip install torch-regkit==9"):
        regkit.load(old)
    kept = json.loads(regkit.load(old, unknown="keep").to_json())
    assert kept["provenance"] == {"lost": {"distribution": "torch-regkit", "version": "9"}}


@pytest.mark.parametrize("prefix", ["regkit", "torch_regkit"])
def test_no_kind_of_this_process_may_pass_for_regkits_own(prefix):
    name = f"{prefix}.lost"
    members = {"__annotations__": {"kind": Literal[name]}, "kind": name, "value": lambda self, w: w.sum()}
    posing = type("Posing", (regkit.Penalty,), {"__module__": __name__, **members})
    with pytest.raises(regkit.PluginError, match=f"may not name a kind '{name}': it may be 'lost'"):
        Registry().register(posing)


def test_a_plugin_in_a_distribution_of_the_former_name_is_a_strangers(install):
    install("regkit", "3.0", "stranger_plugin", PLUGIN.format(name="strange", title="Strange"))
    assert Registry().find("strange").origin.distribution == "regkit"
    registry = Registry(allow=["torch-regkit"])
    assert registry.find("l2") is not None
    assert registry.find("strange") is None


def test_a_regkit_that_was_installed_under_the_former_name_is_to_be_uninstalled(install):
    install("regkit", "0.0.9", "unused", "", {"norms": "regkit_standard.norms"})
    with pytest.raises(regkit.PluginError, match=r"'norms': regkit 0\.0\.9 .* and torch-regkit .*; uninstall one"):
        Registry()
