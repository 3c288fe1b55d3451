"""The documentation's generated pages, tables and navigation are held to the code."""

from __future__ import annotations

import ast
import importlib
import json
import pkgutil
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jsonschema
import pytest
import yaml

import docs
import regkit
import regkit.testing
from docs.docstrings import markdown
from docs.generate.__main__ import main as generate
from regkit.cli import main
from regkit.testing.laws import Law
from tests.benchmarks import report
from tests.benchmarks.bars import bars

FOLDER = Path(docs.__file__).parent
ROOT = FOLDER.parent
PAGES = {str(file.relative_to(FOLDER)): file.read_text(encoding="utf-8") for file in sorted(FOLDER.rglob("*.md"))}
COMMANDS = ("kinds", "check", "plan", "schema", "plugins", "doctor", "new", "conformance")


def first_column(page: str, header: str) -> list[str]:
    """The names in the first columns of a page's tables whose first header cell this is."""
    tables = re.findall(rf"^\| {re.escape(header)} \|.*\n\|[ |-]+\n((?:\|.*\n)+)", PAGES[page], re.MULTILINE)
    assert tables, header
    return [name for table in tables for name in re.findall(r"^\| \[?`([\w.]+)`", table, re.MULTILINE)]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.MULTILINE | re.DOTALL)


# --- what is generated -----------------------------------------------------------------------------------------------


def test_the_committed_pages_are_what_the_generator_writes(capsys):
    assert generate(["--check"]) == 0, capsys.readouterr().out


def test_a_page_that_was_edited_by_hand_is_told_with_the_command_that_mends_it(tmp_path, capsys):
    assert generate([], tmp_path) == 0
    assert generate(["--check"], tmp_path) == 0
    written = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.md")}
    assert written < set(PAGES)
    page = tmp_path / "kinds.md"
    page.write_bytes(page.read_bytes().replace(b"\n", b"\r\n", 1))
    (tmp_path / "api/use.md").unlink()
    capsys.readouterr()
    assert generate(["--check"], tmp_path) == 1
    told = capsys.readouterr()
    assert told.out == f"{tmp_path.name}/kinds.md is out of date\n{tmp_path.name}/api/use.md is out of date\n"
    assert "python -m docs.generate" in told.err
    assert generate([], tmp_path) == 0
    assert generate(["--check"], tmp_path) == 0


@pytest.mark.parametrize("family", ["penalty", "activity penalty", "constraint", "schedule"])
def test_every_kind_has_a_row_and_a_section(family):
    names = [entry.name for entry in regkit.Registry(allow=()).entries(family)]
    assert first_column("kinds.md", family) == names
    assert set(names) <= set(re.findall(r"^### (\w+)$", PAGES["kinds.md"], re.MULTILINE))


def test_each_kind_has_an_example_that_is_a_document():
    examples = blocks("kinds.md", "json")
    assert len(examples) == len(re.findall(r"^### ", PAGES["kinds.md"], re.MULTILINE))
    validator = jsonschema.Draft202012Validator(regkit.schema())
    for example in examples:
        regkit.load(example)
        validator.validate(json.loads(example))


def test_every_law_of_regkit_testing_has_a_row_with_its_reason():
    found = set()
    for room in pkgutil.walk_packages(regkit.testing.__path__, "regkit.testing."):
        found |= {one for one in vars(importlib.import_module(room.name)).values() if isinstance(one, Law)}
    assert set(first_column("laws.md", "law")) == {law.name for law in found}
    reasons = PAGES["laws.md"].replace("\\|", "|").replace("\\*", "*").replace("&lt;", "<")
    for law in found:
        assert law.why in reasons, law.name


def test_every_command_has_a_section_with_every_argument_that_its_help_lists(capsys):
    sections = dict(re.findall(r"^## regkit (\w+)\n(.*?)(?=^## |\Z)", PAGES["cli.md"], re.MULTILINE | re.DOTALL))
    assert tuple(sections) == COMMANDS
    for command, section in sections.items():
        with pytest.raises(SystemExit):
            main([command, "--help"])
        options = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", capsys.readouterr().out)) - {"-h", "--help"}
        assert options <= set(re.findall(r"--?[a-z][\w-]*", section)), command


# --- the API ---------------------------------------------------------------------------------------------------------

MODULES = ("activity", "kinds", "fields", "buckets", "testing")
TRAINERS = ("lightning", "transformers", "skorch")


def documented() -> Counter[str]:
    """Every name that an API page shows, and on how many of them."""
    shown = (re.findall(r"^::: regkit\.([\w.]+)$", text, re.MULTILINE) for text in PAGES.values())
    return Counter(name for names in shown for name in names)


def test_every_public_name_is_on_exactly_one_page():
    shown = documented()
    assert set(shown.values()) == {1}
    assert {name for name in shown if "." not in name} == set(regkit.__all__)


@pytest.mark.parametrize("room", MODULES)
def test_every_public_name_of_a_module_is_on_a_page(room):
    module = importlib.import_module(f"regkit.{room}")
    source = Path(module.__file__).read_text(encoding="utf-8")
    defined = re.findall(r"^(?:class |def )?([A-Za-z]\w*)(?= = |\(|:)", source, re.MULTILINE)
    names = {name for name in getattr(module, "__all__", defined) if hasattr(module, name)}
    assert len(names) > 2
    assert names - set(regkit.__all__) <= {name.removeprefix(f"{room}.") for name in documented()}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_class_for_a_trainer_is_on_a_page(trainer):
    source = (Path(regkit.__file__).parent / f"integrations/{trainer}.py").read_text(encoding="utf-8")
    classes = re.findall(r"^class ([A-Z]\w*)", source, re.MULTILINE)
    assert classes
    assert {f"integrations.{trainer}.{name}" for name in classes} <= set(documented())


# --- what is written by hand -----------------------------------------------------------------------------------------


def pages_in(nav: object) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    entries = nav.values() if isinstance(nav, dict) else nav
    return [page for entry in entries for page in pages_in(entry)]


def test_the_navigation_lists_every_page_once():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert sorted(pages_in(nav)) == sorted(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_blocks_of_json_are_as_narrow_as_the_site_shows_whole(page):
    wide = [line for block in blocks(page, "json") for line in block.splitlines() if len(line) > 84]
    assert not wide


def test_the_costs_are_those_that_were_measured():
    """`python -m tests.benchmarks --publish` writes both."""
    results = json.loads((ROOT / "tests/benchmarks/results.json").read_text(encoding="utf-8"))
    (told,) = re.findall(rf"{re.escape(report.START)}\n(.*?){re.escape(report.END)}", PAGES["costs.md"], re.DOTALL)
    assert told == report.page(results) + "\n"
    assert [(bar["what"], bar["passed"]) for bar in results["bars"]] == [(b.what, b.passed) for b in bars(results)]


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
    table = re.search(r"^\| with \| what holds \|\n\|[ |-]+\n((?:\|.*\n)+)", PAGES["works-with.md"], re.MULTILINE)
    assert table
    rows = [row.split(" | ")[0].removeprefix("| ") for row in table[1].splitlines()]
    assert len(rows) == len(set(rows))
    proven = labels_in_tests()
    assert set(rows) == proven, (set(rows) - proven, proven - set(rows))


# --- docstrings ------------------------------------------------------------------------------------------------------


def test_parameters_become_a_list_that_begins_after_its_paragraph():
    told = markdown(
        "Step: once.\n\nlr, rate: how fast,\nor slow. Raises StepError for\nlr: below 0.\nscale: 1.\n\nThe end."
    )
    assert told.splitlines() == [
        "Step: once.",
        "",
        "- **`lr, rate`**: how fast,",
        "  or slow. Raises StepError for",
        "  lr: below 0.",
        "- **`scale`**: 1.",
        "",
        "The end.",
    ]


def test_only_parameters_begin_an_item_where_they_are_known():
    assert markdown("Go.\n\nNote: all.\nlr: it.", ["lr"]).splitlines()[2:] == ["Note: all.", "", "- **`lr`**: it."]


def test_doctests_become_code_without_their_flags_and_code_stays_as_it_is():
    told = markdown(
        "a < b.\n\n>>> f(1 < 2)  # doctest: +SKIP\n`3`\n\n`a < b` * 2\n\n```python\nlr: int = 1 < 2\n\nx * 3\n```\n"
    )
    assert told == (
        "a &lt; b.\n\n```pycon\n>>> f(1 < 2)\n`3`\n```\n\n`a < b` \\* 2\n\n```python\nlr: int = 1 < 2\n\nx * 3\n```\n"
    )
