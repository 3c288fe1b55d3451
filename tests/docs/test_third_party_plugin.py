"""The example of a third-party plugin, installed and used as a stranger would."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

import regkit
from tests.support.plugins.distributions import environment, install, passed_in, run, unpack

EXAMPLE = Path(__file__).parents[2] / "examples/third_party_plugin"
FOUND = """
import json, torch, regkit
from regkit_nuclear import MinimalGatedCell
registry = regkit.Registry()
entry = registry.find("nuclear")
adapter = registry.adapter(MinimalGatedCell(3, 4))
print(json.dumps([entry.origin.distribution, entry.origin.version, entry.file, type(adapter).__name__]))
regkit.load("spec.json").save("saved.json")
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of it, in which nothing of ours is near."""
    ignored = shutil.ignore_patterns("__pycache__", ".*_cache")
    return Path(shutil.copytree(EXAMPLE, tmp_path / "source", ignore=ignored))


def check_found(told: str, where: Path) -> None:
    distribution, version, file, adapter = json.loads(told)
    assert (distribution, version, adapter) == ("regkit-nuclear", "0.1.0", "MinimalGatedAdapter")
    assert Path(file).is_relative_to(where)


def test_regkit_knows_it_once_it_is_installed_and_names_it_where_it_is_not(source, tmp_path):
    with pytest.raises(regkit.SpecError, match="unknown penalty 'nuclear'"):
        regkit.load(source / "spec.json")
    unpack(source, tmp_path / "site")
    (readme,) = re.findall(r"^```python\n(.*?)^```", (source / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    told = run(sys.executable, "-W", "error", "-c", FOUND + readme, cwd=source, PYTHONPATH=str(tmp_path / "site"))
    found, plan = told.split("\n", maxsplit=1)
    check_found(found, tmp_path / "site")
    assert "nuclear(strength=0.1" in plan
    assert "forget gate" in plan
    with pytest.raises(regkit.SpecError, match=r"regkit-nuclear 0\.1\.0"):
        regkit.load(source / "saved.json")


@pytest.mark.slow
def test_its_own_tests_pass_where_it_is_installed(source, tmp_path):
    unpack(source, tmp_path / "site")
    assert passed_in(sys.executable, cwd=source, PYTHONPATH=str(tmp_path / "site")) > 40


@pytest.mark.slow
def test_it_installs_and_passes_its_tests_in_a_fresh_environment(source, tmp_path):
    python = environment(tmp_path / "fresh")
    install(python, source)
    check_found(run(python, "-c", FOUND, cwd=source), tmp_path / "fresh")
    assert passed_in(python, cwd=source) > 40


@pytest.mark.slow
def test_it_is_typed_and_lint_clean_by_its_own_configuration(source, tmp_path):
    pytest.importorskip("mypy")
    pytest.importorskip("ruff")
    run(sys.executable, "-m", "mypy", "--cache-dir", tmp_path / "cache", cwd=source)
    run(sys.executable, "-m", "ruff", "check", "--no-cache", ".", cwd=source)
    run(sys.executable, "-m", "ruff", "format", "--no-cache", "--check", ".", cwd=source)


def test_it_has_all_that_a_written_distribution_has(tmp_path):
    from regkit.cli.scaffold import scaffold

    written = scaffold("regkit-mine", "penalty", tmp_path / "mine")
    names = {
        path.relative_to(tmp_path / "mine").as_posix().replace("regkit_mine", "regkit_nuclear") for path in written
    }
    assert names <= {path.relative_to(EXAMPLE).as_posix() for path in EXAMPLE.rglob("*")}
    for same in (".gitignore", ".github/workflows/test.yml"):
        assert (EXAMPLE / same).read_text() == (tmp_path / "mine" / same).read_text()
