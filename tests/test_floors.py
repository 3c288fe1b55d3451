"""Imports point down only: each room may use the rooms on the floors below it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = [
    {"buckets", "errors", "fields", "ledger", "rounds", "shards", "table"},
    {"modes", "reduction", "storage", "validity", "step"},
    {"activity", "calls", "computed", "hooks", "mark"},
    {"kept", "kinds", "sites"},
    {"binding", "blocks", "hookspecs"},
    {"entries"},
    {"plugins", "policy"},
    {"registry"},
    {"scaffold"},
    {"foreign", "modules", "shorthand", "source"},
    {"declared", "openunion", "target"},
    {"places", "spec"},
    {"document", "jsonschema"},
    {"selection"},
    {"plan"},
    {"batches", "closed", "copies", "orphans", "watch"},
    {"snapshot", "trials"},
    {"health", "records", "weightrule"},
    {"dense"},
    {"activityrule"},
    {"injection", "weights"},
    {"merging"},
    {"rules"},
    {"program", "reports", "state"},
    {"engine"},
    {"steps"},
    {"attachment"},
    {"attaching"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
ROOMS = sorted(path for path in (ROOT / "regkit").glob("*.py") if path.stem not in ("__init__", "__main__", "_pickled"))
PICKLED = ROOT / "regkit/_pickled.py"
"""The room that pickles name. Every room may use it, and it uses any, but only once a pickle is written or read."""
SUITES = sorted(path for suite in ("cli", "integrations", "testing") for path in (ROOT / "regkit" / suite).glob("*.py"))
"""What stands beside the rooms and is used by none of them."""
PLUGINS = sorted(path for path in (ROOT / "plugins/regkit_standard").glob("*.py") if path.stem != "__init__")


def imports(path: Path) -> set[str]:
    """Every module that the file imports, wherever in it, with the names taken from packages."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            found |= (
                {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "regkit" else {node.module}
            )
    return found


def rooms_used(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.startswith("regkit.")}


def test_every_room_has_a_floor():
    assert {path.stem for path in ROOMS} == set(FLOOR_OF)


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: path.stem)
def test_a_room_imports_only_from_floors_below(path):
    above = {room for room in rooms_used(path) - {PICKLED.stem} if FLOOR_OF[room] >= FLOOR_OF[path.stem]}
    assert not above, f"{path.stem} (floor {FLOOR_OF[path.stem]}) uses {above}"


def test_the_room_of_pickles_imports_no_other_until_it_is_called():
    outside = (
        "import sys, regkit._pickled; print([name for name in sys.modules if name.startswith(('regkit.', 'torch'))])"
    )
    ended = subprocess.run([sys.executable, "-c", outside], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout.strip() == "['regkit._pickled']"


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: path.stem)
def test_regkit_never_imports_its_standard_kinds(path):
    assert not any(name.startswith("regkit_standard") for name in imports(path))


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: path.stem)
def test_no_room_knows_the_command_line_the_laws_or_a_trainer(path):
    assert not rooms_used(path) & {"cli", "integrations", "testing"}


OUTSIDE = [path for path in SUITES if path.parent.stem != "cli"]  # the command line shows what is inside


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: f"{path.parent.stem}-{path.stem}")
def test_the_laws_and_the_integrations_use_what_a_stranger_may(path):
    public = {"activity", "buckets", "errors", "fields", "kinds", "sites", "validity", path.parent.stem}
    assert rooms_used(path) <= public | set(__import__("regkit").__all__)


@pytest.mark.parametrize("path", PLUGINS, ids=lambda path: path.stem)
def test_standard_kinds_use_what_a_stranger_may_and_never_one_another(path):
    # The contracts' rooms; all else comes from the package itself.
    public = {"activity", "buckets", "fields", "kinds", "validity"}
    names = imports(path)
    assert not any(name.startswith("regkit_standard") for name in names)
    exported = __import__("regkit").__all__
    used = rooms_used(path)
    assert used <= public | set(exported), used


@pytest.mark.parametrize("room", ["spec", "document", "jsonschema", "target", "source", "shorthand", "openunion"])
def test_the_document_knows_no_tensor(room):
    assert not any(name.split(".")[0] == "torch" for name in imports(ROOT / "regkit" / f"{room}.py"))


def test_the_plan_knows_no_hook_and_the_steps_know_no_document():
    assert not rooms_used(ROOT / "regkit/plan.py") & {"steps", "records", "attachment"}
    for room in ("steps", "weights", "records", "rules", "engine"):
        assert not rooms_used(ROOT / f"regkit/{room}.py") & {"spec", "document", "target"}, room


def test_no_room_has_grown_past_what_one_holds_in_mind():
    long = {
        path.name: lines
        for path in (*ROOMS, PICKLED, *SUITES, *PLUGINS)
        if (lines := len(path.read_text().splitlines())) > 300
    }
    assert not long
