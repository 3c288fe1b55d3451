"""`regkit new`: what it writes is a whole distribution, which installs and passes its own tests untouched."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from regkit import PluginError
from regkit.cli.scaffold import TEMPLATES, Template, scaffold
from tests.support.plugins.distributions import environment, install, passed_in, run, unpack, wheel

ROOT = Path(__file__).parents[2]
TREE = [
    ".github/workflows/test.yml",
    ".gitignore",
    "LICENSE",
    "README.md",
    "pyproject.toml",
    "src/regkit_mine/__init__.py",
    "src/regkit_mine/py.typed",
    "tests/test_conformance.py",
    "tests/test_training.py",
]
KINDS = {family: None if family == "adapter" else f"my_{family}" for family in TEMPLATES}
PRINT_KINDS = """
import json, regkit
entries = {entry.name: [entry.origin.distribution, entry.origin.version] for entry in regkit.Registry().entries()}
print(json.dumps(entries))
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[Template, Path]:
    """One of each family, as it is written."""
    folder = tmp_path_factory.mktemp("written")
    for family in TEMPLATES:
        scaffold(f"regkit-my-{family}", family, folder / f"regkit-my-{family}")
    return {family: folder / f"regkit-my-{family}" for family in TEMPLATES}


def check_kinds(told: str) -> None:
    """Each kind is known, and by whose it is."""
    entries = json.loads(told)
    for family, kind in KINDS.items():
        assert kind is None or entries[kind] == [f"regkit-my-{family}", "0.1.0"]


@pytest.mark.parametrize("family", TEMPLATES)
def test_a_whole_distribution_is_written(family, tmp_path):
    folder = tmp_path / "mine"
    files = scaffold("regkit-mine", family, folder)
    assert [path.relative_to(folder).as_posix() for path in files] == TREE
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == sorted(files)
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert "$" not in text.replace("${{ matrix.python }}", ""), path
        assert "PACKAGE" not in text
    assert "copyright (c) " in (folder / "LICENSE").read_text().lower()
    assert "The regkit-mine authors" in (folder / "LICENSE").read_text()


@pytest.mark.parametrize(
    ("name", "package", "kind", "cls"),
    [
        ("regkit-nuclear", "regkit_nuclear", "nuclear", "Nuclear"),
        ("regkit-row-lasso", "regkit_row_lasso", "row_lasso", "RowLasso"),
        ("acme-rows2", "acme_rows2", "acme_rows2", "AcmeRows2"),
    ],
)
def test_all_names_come_from_the_one_given(name, package, kind, cls, tmp_path):
    scaffold(name, "penalty", tmp_path / "it")
    module = (tmp_path / "it/src" / package / "__init__.py").read_text()
    assert f'kind: Literal["{kind}"] = "{kind}"' in module
    assert f"class {cls}(Penalty):" in module
    project = (tmp_path / "it/pyproject.toml").read_text()
    assert f'\n[project.entry-points.regkit]\n{name} = "{package}"\n' in project
    assert f'\nname = "{name}"\n' in project


@pytest.mark.slow
def test_what_is_written_works_as_it_is_once_it_is_installed(written, tmp_path):
    site = tmp_path / "site"
    for folder in written.values():
        unpack(folder, site)
    blocks = [
        block
        for folder in written.values()
        for block in re.findall(r"^```python\n(.*?)^```", (folder / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    ]
    assert len(blocks) == len(TEMPLATES)
    readmes = "".join(f"exec({block!r}, {{}})\n" for block in blocks)
    told = run(sys.executable, "-W", "error", "-c", readmes + PRINT_KINDS, cwd=tmp_path, PYTHONPATH=str(site))
    check_kinds(told.splitlines()[-1])
    folders = [folder / "tests" for folder in written.values()]
    assert passed_in(sys.executable, *folders, cwd=tmp_path, PYTHONPATH=str(site)) > 20 * len(TEMPLATES)


@pytest.mark.slow
def test_what_is_written_installs_and_passes_its_tests_in_a_fresh_environment(written, tmp_path):
    python = environment(tmp_path / "fresh")
    install(python, *written.values())
    for family, folder in written.items():
        assert passed_in(python, cwd=folder) > 10, family
        place = f"import importlib.util as found; print(found.find_spec('regkit_my_{family}').origin)"
        assert Path(run(python, "-c", place, cwd=tmp_path).strip()).is_relative_to(tmp_path / "fresh")
    check_kinds(run(python, "-c", PRINT_KINDS, cwd=tmp_path))


@pytest.mark.parametrize("name", ["a", "regkit-a", "o" * 32])
def test_what_is_written_is_lint_clean_however_long_its_name_is(name, tmp_path):
    pytest.importorskip("ruff")
    for family in TEMPLATES:
        scaffold(name, family, tmp_path / family)
    for arguments in (["check", "."], ["format", "--check", "."]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *arguments, "--no-cache"], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_what_is_written_is_strictly_typed(written, tmp_path):
    pytest.importorskip("mypy")
    for folder in written.values():
        # One cache for all, so that torch is read once; with paths that differ, for their tests are called alike.
        options = ("--config-file", folder / "pyproject.toml", "--cache-dir", tmp_path)
        run(sys.executable, "-m", "mypy", *options, folder / "src", folder / "tests", cwd=tmp_path)


def test_templates_are_in_the_wheel(tmp_path):
    names = set(zipfile.ZipFile(wheel(ROOT, tmp_path / "wheels")).namelist())
    templates = {path.relative_to(ROOT).as_posix() for path in (ROOT / "regkit/cli/templates").rglob("*.tmpl")}
    assert len(templates) > 20
    assert templates <= names


@pytest.mark.slow
def test_the_wheel_has_what_ci_asks_of_it(tmp_path):
    site = tmp_path / "site-packages"
    unpack(ROOT, site)
    (built,) = (tmp_path / "site-packages-wheels").glob("*.whl")
    check = (ROOT / ".ci/check_wheel.py", built, ROOT / "pyproject.toml")
    assert "7 plugins" in run(sys.executable, *check, cwd=tmp_path, PYTHONPATH=str(site))


@pytest.mark.parametrize(
    "name",
    [
        "",
        "Regkit-Mine",
        "regkit_mine",
        "regkit mine",
        "regkit-",
        "-mine",
        "2-rows",
        "regkit--mine",
        "../mine",
        "x" * 33,
    ],
)
def test_a_bad_name_is_refused(name, tmp_path):
    with pytest.raises(PluginError, match="a distribution is named in lower-case words with hyphens between") as told:
        scaffold(name, "penalty", tmp_path / "it")
    assert repr(name) in str(told.value)
    assert not (tmp_path / "it").exists()


@pytest.mark.parametrize(
    ("name", "family", "why"),
    [
        ("torch", "adapter", "a distribution 'torch' is installed already"),
        ("torch-regkit", "penalty", "a distribution 'torch-regkit' is installed already"),
        ("regkit", "penalty", "would need a package 'regkit', which Python has already"),
        ("regkit-standard", "penalty", "would need a package 'regkit_standard', which Python has already"),
        ("json", "schedule", "would need a package 'json', which Python has already"),
        ("graphlib", "schedule", "would need a package 'graphlib', which Python has already"),
        ("class", "penalty", "would need a package 'class', which Python has already"),
        ("regkit-l2", "penalty", r"kind 'l2', which torch-regkit \S+ offers as a penalty"),
        ("regkit-max-norm", "schedule", r"kind 'max_norm', which torch-regkit \S+ offers as a constraint"),
        ("regkit-rule", "penalty", "kind 'rule', which no kind may be called"),
        ("regkit-2d", "penalty", "class '2d', and none begins so"),
        ("regkit-2d", "adapter", "class '2d', and none begins so"),
        ("regkit-i", "penalty", "class I, which looks like a digit"),
        ("regkit-tensor", "penalty", "class Tensor, as something that it imports"),
        ("regkit-activity-penalty", "activity", "class ActivityPenalty, as something that it imports"),
        ("regkit-mine", "regularizer", "unknown family 'regularizer'"),
    ],
)
def test_a_name_that_is_taken_is_refused(name, family, why, tmp_path):
    with pytest.raises(PluginError, match=why) as told:
        scaffold(name, family, tmp_path / "it")
    assert "\n" not in str(told.value)
    assert not (tmp_path / "it").exists()


def test_an_adapter_may_be_called_as_a_kind_for_it_has_none(tmp_path):
    scaffold("regkit-l2", "adapter", tmp_path / "it")
    assert "class L2Cell(nn.Module):" in (tmp_path / "it/src/regkit_l2/__init__.py").read_text()


def test_a_kind_may_be_called_class_which_nothing_imports(tmp_path):
    scaffold("regkit-class", "penalty", tmp_path / "it")
    assert "class Class(Penalty):" in (tmp_path / "it/src/regkit_class/__init__.py").read_text()


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(PluginError, match="is not empty"):
        scaffold("regkit-mine", "penalty", tmp_path)
    with pytest.raises(PluginError, match=r"mine\.txt is a file"):
        scaffold("regkit-mine", "penalty", tmp_path / "mine.txt")
    with pytest.raises(PluginError, match=r"cannot write .*Not a directory|cannot write .*exists"):
        scaffold("regkit-mine", "penalty", tmp_path / "mine.txt" / "below")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("existed", [True, False])
def test_where_writing_fails_nothing_is_left_half_written(existed, tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    if existed:
        folder.mkdir()
    write, calls = Path.write_text, []

    def full(path: Path, *arguments: object, **options: object) -> int:
        calls.append(path)
        if len(calls) == 6:
            raise OSError(28, "No space left on device")
        return write(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(PluginError, match=r"cannot write .*No space left on device"):
        scaffold("regkit-mine", "penalty", folder)
    assert len(calls) == 6
    assert folder.exists() == existed
    assert not existed or not any(folder.iterdir())
    monkeypatch.undo()
    assert len(scaffold("regkit-mine", "penalty", folder)) == len(TREE)
