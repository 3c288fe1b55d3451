"""README, the pages of docs/ and CHANGELOG are held to the code: blocks run, tables are complete, messages are real."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata

import pytest
import torch

import regkit
from regkit.registry import hookspecs
from regkit.registry.policy import Policy
from regkit.registry.registry import default
from regkit.testing import check_penalty
from tests.support.pages import DOCS, README, ROOT, block_with, blocks, first_column, run_page

PAGES = [README, *sorted(DOCS.rglob("*.md"))]
each_page = pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page)], ids=lambda page: page.relative_to(ROOT).as_posix()
)


@each_page
def test_the_blocks_of_a_page_run_in_order_and_print_what_it_shows(page, tmp_path):
    with default().temporary():
        run_page(page, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*does not have many workers")  # Lightning's advice
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning")  # Lightning's use of torch
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")  # Keras' own
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(block.slow for block in blocks(page))], ids=lambda page: page.stem
)
def test_a_page_runs_with_its_trainers_and_keras_too(page, tmp_path):
    with default().temporary():
        run_page(page, tmp_path, slow=True)


def test_a_page_that_shows_something_else_is_found_out(tmp_path):
    page = tmp_path / "wrong.md"
    right = "```python\nprint(2)\n```\n\n```text\n2\n```\n"
    page.write_text(right)
    run_page(page, tmp_path)
    page.write_text(right.replace("text\n2", "text\n3"))
    with pytest.raises(AssertionError, match=r"wrong\.md, line 5, shows"):
        run_page(page, tmp_path)
    page.write_text("```bash\nregkit check nothing.json\n```\n")
    with pytest.raises(AssertionError, match="cannot read the file"):
        run_page(page, tmp_path)
    page.write_text('```json\n{"rules": [{"penalty": "l2(-1)"}]}\n```\n')
    with pytest.raises(regkit.SpecError):
        run_page(page, tmp_path)
    page.write_text('```python title="unclosed\n```\n')
    with pytest.raises(AssertionError, match="fence"):
        blocks(page)


@each_page
def test_the_code_of_a_page_begins_with_its_imports(page):
    code = [block.code for block in blocks(page, "python")]
    assert not code or re.match(r"from |import ", code[0])


def test_the_language_is_told_in_documents():
    assert len(blocks(DOCS / "document.md", "json")) >= 3
    assert blocks(README, "json")
    assert blocks(DOCS / "keras.md", "json")


@each_page
def test_code_fits_the_width_of_a_page(page):
    widest = 120 if page == README else 84
    for block in [*blocks(page, "python"), *blocks(page, "json")]:
        too_wide = [line for line in block.code.splitlines() if len(line) > widest]
        assert not too_wide, (block.above, too_wide)


def test_readme_is_a_page():
    assert len(README.read_bytes()) <= 9216


def test_the_links_of_readme_lead_to_pages():
    links = re.findall(r"\]\(([^)]*)\)", README.read_text(encoding="utf-8"))
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).is_file()] == []  # those of docs/ are held by the strict builds


def test_the_first_two_bash_blocks_are_the_main_job_and_the_tests():
    main_job, tests = (block.code for block in blocks(README, "bash")[:2])
    assert "python examples/word_lm.py" in main_job
    assert "python -m pytest" in tests
    for block in (main_job, tests):
        assert "python3 -m venv" in block
        assert "-c constraints.txt" in block
    printed = subprocess.run(
        [sys.executable, ROOT / ".ci/readme_block.py", "2"], capture_output=True, text=True, check=True
    )
    assert printed.stdout == tests  # what .ci/run runs is what README says


@pytest.mark.parametrize(
    ("row", "families"),
    [("penalties", ("penalty", "activity penalty")), ("constraints", ("constraint",)), ("schedules", ("schedule",))],
)
def test_readme_names_every_kind(row, families):
    (cell,) = re.findall(rf"^\| {row} \| (.*) \|$", README.read_text(encoding="utf-8"), re.MULTILINE)
    own = default().find("l2").origin.distribution
    ours = [e.name for family in families for e in default().entries(family) if e.origin.distribution == own]
    assert sorted(re.findall(r"`(\w+)`", cell)) == sorted(ours)


def test_the_table_of_hooks_is_complete():
    hooks = [name for name in vars(hookspecs) if name.startswith("regkit_")]
    assert first_column(DOCS / "plugins.md", "hook") == hooks


def test_the_table_of_channels_is_complete():
    assert sorted(first_column(DOCS / "training-loop.md", "`via`")) == ["decoupled", "gradient", "loss", "proximal"]


def test_the_tables_of_a_rule_and_a_target_are_complete():
    assert set(first_column(DOCS / "document.md", "in a rule")) == set(regkit.Rule.model_fields)
    cells = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", (DOCS / "document.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(regkit.Target.model_fields) <= {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def test_every_error_class_has_its_heading():
    raised = [name for name in regkit.__all__ if name.endswith(("Error", "Warning"))]
    page = (DOCS / "errors.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^## (\w+)$", page, re.MULTILINE)) == sorted(raised)
    assert sorted(first_column(DOCS / "errors.md", "class")) == sorted(raised)
    for name, others in re.findall(r"^\| `(\w+)` \| `(\w+)` \|", page, re.MULTILINE):
        assert others in [base.__name__ for base in getattr(regkit, name).__mro__], name


def test_what_a_page_says_of_a_wrong_kind_is_what_is_said():
    code = block_with(DOCS / "plugins.md", "python", "class NuclearNorm").replace("at_least_float32(w)", "w")
    names: dict[str, object] = {"__name__": "__main__", "regkit": regkit, "torch": torch}
    with default().temporary():
        exec(compile(code, "plugins.md", "exec", dont_inherit=True), names)
    said = " ".join(str(check_penalty(names["NuclearNorm"](strength=1.0))).split())
    seen, why = block_with(DOCS / "plugins.md", "text", "FAILED  value_is").split("FAILED")[1].split(" …")
    assert " ".join(seen.split()) in said
    assert " ".join(why.split()) in said


def test_the_table_of_variables_is_complete():
    asked = []

    class Environment(dict):
        def get(self, name, default=None):
            asked.append(name)
            return default

    Policy.from_environment(None, (), Environment())
    assert first_column(DOCS / "plugins.md", "variable") == asked


def described(body: list[ast.stmt]) -> Iterator[str]:
    """The functions, classes and other names that a module defines with a docstring."""
    for statement, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(statement, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(statement):
            yield statement.name
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            yield from (target.id for target in targets if isinstance(target, ast.Name))


def test_every_name_of_the_api_pages_is_described():
    pages = (page.read_text("utf-8") for page in PAGES)
    shown = {name for page in pages for name in re.findall(r"^::: [\w.]*\.(\w+)$", page, re.MULTILINE)}
    assert set(regkit.__all__) <= shown
    sources = (ROOT / "regkit").rglob("*.py")
    assert not shown - {name for file in sources for name in described(ast.parse(file.read_text("utf-8")).body)}


def test_the_packages_and_rooms_of_the_architecture_are_those_on_disk():
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    house = ROOT / "regkit"
    table = dict(re.findall(r"^\| `(\w+)/` \| (.*?) \|", text, re.MULTILINE))
    assert set(table) == {path.parent.name for path in house.glob("*/__init__.py")}
    named = {(package, room) for package, rooms in table.items() for room in re.findall(r"`(\w+)/?`", rooms)}
    named |= {(package, room) for package, room in re.findall(r"`(\w+)/(\w+)/?`", text) if package in table}
    named |= {(".", room) for room in re.findall(r"`(\w+)\.py`", text)}
    rooms = {path for path in house.rglob("*") if path.suffix == ".py" or (path / "__init__.py").is_file()}
    there = {(path.relative_to(house).parts[0] if path.parent != house else ".", path.stem) for path in rooms}
    there |= {("cli", "templates")}
    assert named <= there
    told = {
        (path.parent.name, path.stem) for path in rooms if path.parent.parent == house and path.parent.name != "cli"
    }
    told |= {(".", path.stem) for path in house.glob("*.py")}
    assert {(package, room) for package, room in told if not room.startswith("__")} <= named


def test_versions_agree():
    assert regkit.__version__ == metadata.version("torch-regkit")
    assert f"## {regkit.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_constraints_pin_what_readme_installs():
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
    wanted = {re.match(r"[\w-]+", one)[0] for one in metadata.requires("torch-regkit") or []}
    assert wanted - {"torch-regkit"} <= pinned
