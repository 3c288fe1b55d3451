"""README and CHANGELOG are held to the code: blocks run, tables are complete, messages are what is said."""

from __future__ import annotations

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
from regkit import hookspecs
from regkit.policy import Policy
from regkit.registry import default
from regkit.testing import check_penalty

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


def test_versions_agree():
    assert regkit.__version__ == metadata.version("regkit")
    assert f"## {regkit.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_constraints_pin_what_readme_installs():
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
    wanted = {re.match(r"[\w-]+", one)[0] for one in metadata.requires("regkit") or []}
    assert wanted - {"regkit"} <= pinned
