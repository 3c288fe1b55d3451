"""Imports point down only: each package may use the packages on the floors below, and no room is in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import regkit

ROOT = Path(__file__).parents[1]
HOUSE = ROOT / "regkit"

FLOORS = [
    {"vocabulary"},
    {"_pickled", "buckets", "errors", "fields"},
    {"activity", "runtime", "sites"},
    {"adapters", "kinds"},
    {"registry", "weights"},
    {"document"},
    {"plan"},
    {"recording"},
    {"rules"},
    {"engine"},
    {"attachment"},
    {"integrations", "testing"},
    {"cli"},
]
"""The packages and the rooms that stand beside them, from the ground up."""
FLOOR_OF = {box: floor for floor, boxes in enumerate(FLOORS) for box in boxes}
PUBLIC = {"activity", "adapters", "buckets", "errors", "fields", "kinds", "sites"}
"""What plugins and their laws import from, beside the top level."""

ROOMS = sorted(path for path in HOUSE.rglob("*.py") if path.parent != HOUSE or not path.stem.startswith("__"))
PLUGINS = sorted(path for path in (ROOT / "plugins/regkit_standard").glob("*.py") if path.stem != "__init__")


def name_of(path: Path) -> str:
    """The dotted name of a module of regkit, or of a package by its `__init__`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def box_of(module: str) -> str:
    """The package, or the room beside the packages, that a module of regkit is in."""
    return module.split(".")[1]


@cache
def imports(path: Path) -> frozenset[str]:
    """Every module that the file imports, wherever in it, with the modules that are taken from packages.

    Of `regkit._pickled` at its top alone: what it loads is imported when a pickle asks for it.
    """
    found: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if path.stem == "_pickled" else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return frozenset(found)


def modules_used(path: Path) -> Iterator[str]:
    """The modules of regkit that a file imports."""
    known = set(map(name_of, ROOMS))
    return (name for name in imports(path) if name in known)


def boxes_used(path: Path, but: frozenset[str] = frozenset()) -> set[str]:
    """The packages of regkit that a file imports from, and the rooms beside them; a public name is one of the top's.

    but: names that do not count, in their modules.
    """
    names = imports(path) - but - {name.rpartition(".")[0] for name in but}
    names = {name for name in names if name.startswith("regkit.")}
    return {box_of(name) for name in names} - set(regkit.__all__)


ids = {"ids": lambda path: name_of(path).removeprefix("regkit.")}


def test_every_package_has_a_floor():
    assert {box_of(name_of(path)) for path in ROOMS} == set(FLOOR_OF)
    assert len(FLOORS) <= 14


@pytest.mark.parametrize("path", ROOMS, **ids)
def test_a_package_imports_only_from_floors_below(path):
    own = box_of(name_of(path))
    above = {box for box in boxes_used(path) - {own} if FLOOR_OF[box] >= FLOOR_OF[own]}
    assert not above, f"{own} (floor {FLOOR_OF[own]}) uses {above}"


BELOW_THE_TOP = [path for path in ROOMS if box_of(name_of(path)) not in ("testing", "integrations", "cli")]


@pytest.mark.parametrize("path", BELOW_THE_TOP, **ids)
def test_a_room_that_public_names_come_from_takes_none_from_the_top(path):
    taken = {f"regkit.{name}" for name in regkit.__all__} & imports(path)
    assert not taken, f"{name_of(path)} takes {taken}"
    statements = [one for one in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(one, ast.Import)]
    assert "regkit" not in {alias.name for one in statements for alias in one.names}


def test_no_room_is_in_a_circle():
    # A package's `__init__` is imported before its rooms: it may name them, and is no circle for that.
    graph = {name_of(path): set(modules_used(path)) for path in ROOMS if path.stem != "__init__"}
    packages = {name_of(path) for path in ROOMS if path.stem == "__init__"}
    TopologicalSorter({room: used - packages for room, used in graph.items()}).prepare()


@pytest.mark.parametrize("path", [path for path in ROOMS if path.stem == "__init__"], **ids)
def test_a_package_imports_none_of_its_rooms_unless_it_is_public(path):
    public = {"regkit.activity", "regkit.kinds", "regkit.testing", "regkit.cli"}
    assert name_of(path) in public or not any(map(str, modules_used(path)))


@pytest.mark.parametrize("path", ROOMS, **ids)
def test_regkit_never_imports_its_standard_kinds(path):
    assert not any(name.startswith("regkit_standard") for name in imports(path))


CHECKS_OF_ADAPTERS = frozenset(
    {
        "regkit.plan.declarations.outputs_of",
        "regkit.plan.declarations.weights_of",
        "regkit.plan.modules.RecurrentModule",
    }
)
"""The core's own checks and the class of their argument, for the laws: a copy might pass what `resolve` refuses."""

OUTSIDE = [path for path in ROOMS if box_of(name_of(path)) in ("testing", "integrations")]


@pytest.mark.parametrize("path", OUTSIDE, **ids)
def test_the_laws_and_the_integrations_use_what_a_stranger_may(path):
    assert boxes_used(path, CHECKS_OF_ADAPTERS) <= PUBLIC | {box_of(name_of(path))}


@pytest.mark.parametrize("path", PLUGINS, ids=lambda path: path.stem)
def test_standard_kinds_use_what_a_stranger_may_and_of_one_another_only_foreach(path):
    others = {name.split(".")[1] for name in imports(path) if name.startswith("regkit_standard.")}
    assert others <= (set() if path.stem == "foreach" else {"foreach"})
    assert boxes_used(path) <= PUBLIC


@pytest.mark.parametrize("path", [path for path in ROOMS if box_of(name_of(path)) == "document"], **ids)
def test_the_document_knows_no_tensor(path):
    assert not any(name.split(".")[0] == "torch" for name in imports(path))


@pytest.mark.parametrize("path", [path for path in ROOMS if FLOOR_OF[box_of(name_of(path))] in (7, 8, 9)], **ids)
def test_what_runs_at_a_step_knows_no_document(path):
    assert "document" not in boxes_used(path)


def test_no_room_has_grown_past_what_one_holds_in_mind():
    long = {name_of(path): lines for path in ROOMS if (lines := len(path.read_text().splitlines())) > 300}
    long |= {path.stem: lines for path in PLUGINS if (lines := len(path.read_text().splitlines())) > 300}
    assert not long


def test_no_package_has_grown_past_what_one_holds_in_mind():
    packages = {path.parent for path in ROOMS if path.parent != HOUSE}
    rooms = {folder.name: [path.stem for path in folder.glob("*.py") if path.stem != "__init__"] for folder in packages}
    assert not {package: inside for package, inside in rooms.items() if len(inside) > 9}
    assert len(list(HOUSE.glob("*.py"))) <= 10
