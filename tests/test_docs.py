"""README and CHANGELOG are held to the code: blocks run, tables are complete, messages are what is said."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import jsonschema
import pytest
import torch

import regkit
from regkit.cli import main
from regkit.registry import hookspecs
from regkit.registry.policy import Policy
from regkit.registry.registry import default
from regkit.testing import check_penalty
from regkit.testing.activities import laws as activities
from regkit.testing.adapters import laws as adapters
from regkit.testing.kinds import constraints, penalties, schedules
from regkit.testing.kinds.common import KIND_LAWS
from tests.benchmarks import report
from tests.benchmarks.bars import bars

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def first_column(header: str) -> list[str]:
    """The names in the first column of the table whose first header cell this is."""
    table = re.search(rf"^\| {re.escape(header)} \|.*\n\|[ |-]+\n((?:\|.*\n)+)", README, re.MULTILINE)
    assert table, header
    return re.findall(r"^\| `([\w.]+)`", table[1], re.MULTILINE)


def test_the_python_blocks_run_in_order(capsys):
    names: dict[str, object] = {"__name__": "__main__"}
    with default().temporary():
        for block in blocks("python"):
            exec(compile(block, "README.md", "exec", dont_inherit=True), names)
    printed = capsys.readouterr().out
    assert "'rules/0'" in printed
    assert "nuclear(strength=0.001)" in printed
    assert re.search(r"UnitAdapter on Unit.*: (\d+) of \1 laws hold", printed)


def test_the_json_blocks_are_valid_documents():
    assert blocks("json")
    for block in blocks("json"):
        regkit.load(block)
        jsonschema.validate(json.loads(block), regkit.schema())


def test_the_first_two_bash_blocks_are_the_main_job_and_the_tests():
    main_job, tests = blocks("bash")[:2]
    assert "python examples/word_lm.py" in main_job
    assert "python -m pytest" in tests
    for block in (main_job, tests):
        assert "python3 -m venv" in block
        assert "-c constraints.txt" in block
    printed = subprocess.run(
        [sys.executable, ROOT / ".ci/readme_block.py", "2"], capture_output=True, text=True, check=True
    )
    assert printed.stdout == tests  # what .ci/run runs is what README says


@pytest.mark.parametrize("family", ["penalty", "activity penalty", "constraint", "schedule"])
def test_the_tables_of_kinds_are_complete(family):
    ours = [e.name for e in default().entries(family) if e.origin.distribution == "torch-regkit"]
    assert sorted(first_column(family)) == ours


def test_the_table_of_hooks_is_complete():
    hooks = [name for name in vars(hookspecs) if name.startswith("regkit_")]
    assert first_column("hook") == hooks


def test_the_table_of_channels_is_complete():
    assert sorted(first_column("`via`")) == ["decoupled", "gradient", "loss", "proximal"]


def test_the_error_in_readme_is_what_is_said(tmp_path):
    text = (
        '{"rules": [\n'
        '  {"constraint": "max_norm(3)"},\n'
        '  {"penalty": {"kind": "l2", "strength": -1}},\n'
        '  {"target": {"role": "recurent"}, "penalty": "l2(1)"}]}\n'
    )
    (tmp_path / "spec.json").write_text(text)
    with pytest.raises(regkit.SpecError) as caught:
        regkit.load(tmp_path / "spec.json")
    said = str(caught.value).replace(f"{tmp_path}/", "").splitlines()
    (block,) = [block for block in blocks("text") if "is not a valid spec" in block]
    for ours, readmes in zip(said, block.splitlines(), strict=True):
        assert ours.startswith(readmes.removesuffix("…"))


def test_the_command_line_in_readme_exists():
    (block,) = [block for block in blocks("text") if block.startswith("regkit kinds")]
    commands = re.findall(r"^regkit (\w+)", block, re.MULTILINE)
    for command in commands:
        with pytest.raises(SystemExit) as done:
            main([command, "--help"])
        assert done.value.code == 0
    assert commands == ["kinds", "check", "plan", "schema", "plugins", "doctor", "new", "conformance"]


def test_the_table_of_laws_is_complete():
    table = re.search(r"^\| laws of \|.*\n\|[ |-]+\n((?:\|.*\n)+)", README, re.MULTILINE)
    rows = {
        title: re.findall(r"`(\w+)`", laws) for title, laws in re.findall(r"^\| ([\w ]+) \| (.*) \|$", table[1], re.M)
    }
    every = [law.name for law in KIND_LAWS]
    assert rows.pop("every kind") == every
    rooms = {
        "penalties": penalties, "activity penalties": activities, "constraints": constraints,
        "schedules": schedules, "adapters": adapters,
    }  # fmt: skip
    assert rows == {title: [law.name for law in room.LAWS if law.name not in every] for title, room in rooms.items()}


def test_what_readme_says_of_a_wrong_kind_is_what_is_said():
    (block,) = [block for block in blocks("python") if "class NuclearNorm" in block]
    names: dict[str, object] = {"__name__": "__main__", "regkit": regkit, "torch": torch}
    with default().temporary():
        exec(compile(block.replace("at_least_float32(w)", "w"), "README.md", "exec", dont_inherit=True), names)
    said = " ".join(str(check_penalty(names["NuclearNorm"](strength=1.0))).split())
    (text,) = [block for block in blocks("text") if "FAILED  halves" in block]
    seen, why = text.split("FAILED")[1].split(" …")
    assert " ".join(seen.split()) in said
    assert " ".join(why.split()) in said


def test_the_table_of_variables_is_complete(monkeypatch):
    asked = []

    class Environment(dict):
        def get(self, name, default=None):
            asked.append(name)
            return default

    Policy.of(None, (), Environment())
    assert first_column("variable") == asked


def test_every_public_name_exists_and_is_described():
    for name in regkit.__all__:
        public = getattr(regkit, name)
        assert getattr(public, "__doc__", None), name


def test_the_costs_in_readme_are_those_that_were_measured():
    """`python -m tests.benchmarks --readme` writes both."""
    results = json.loads((ROOT / "tests/benchmarks/results.json").read_text(encoding="utf-8"))
    (told,) = re.findall(rf"{re.escape(report.START)}\n(.*?){re.escape(report.END)}", README, re.DOTALL)
    assert told == report.readme(results) + "\n"
    assert [(bar["what"], bar["passed"]) for bar in results["bars"]] == [(b.what, b.passed) for b in bars(results)]


def test_versions_agree():
    assert regkit.__version__ == metadata.version("torch-regkit")
    assert f"## {regkit.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_constraints_pin_what_readme_installs():
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
    wanted = {re.match(r"[\w-]+", one)[0] for one in metadata.requires("torch-regkit") or []}
    assert wanted - {"torch-regkit"} <= pinned


COLLECT = """
import pytest

class Labels:
    found = set()

    def pytest_itemcollected(self, item):
        self.found.update(*(mark.args for mark in item.iter_markers("works_with")))

status = pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider"], plugins=[Labels()])
assert status == 0, status
print("LABELS", sorted(Labels.found))
"""


def labels_in_tests() -> set[str]:
    """The rows that tests say they prove, with works_with("..."), as pytest collects them all."""
    done = subprocess.run([sys.executable, "-c", COLLECT], cwd=ROOT, capture_output=True, text=True, check=True)
    (line,) = re.findall(r"^LABELS (.*)$", done.stdout, re.MULTILINE)
    return set(ast.literal_eval(line))


@pytest.mark.slow
def test_what_regkit_works_with_is_what_tests_prove():
    table = re.search(r"^\| with \| what holds \|\n\|[ |-]+\n((?:\|.*\n)+)", README, re.MULTILINE)
    assert table
    rows = [row.split(" | ")[0].removeprefix("| ") for row in table[1].splitlines()]
    assert len(rows) == len(set(rows))
    proven = labels_in_tests()
    assert set(rows) == proven, (set(rows) - proven, proven - set(rows))
