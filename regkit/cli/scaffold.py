"""`regkit new`: the whole distribution of a plugin, written from templates.

The templates are folders of files in `templates`, beside this one: in `every`, what all distributions have; beside it,
what one has. Where both have a file, the template's own text comes before that of `every`.
"""

from __future__ import annotations

import argparse
import importlib.util
import keyword
import re
import shlex
import shutil
import string
import sys
from collections.abc import Iterator, Mapping
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Final, Literal, get_args

from regkit.errors import PluginError, unknown
from regkit.registry.names import OWN, RESERVED

Template = Literal["penalty", "constraint", "activity", "schedule", "adapter"]

TEMPLATES: Final[Mapping[Template, str]] = {
    "penalty": "a penalty on weights: a group lasso over rows",
    "constraint": "a constraint on weights: an interval",
    "activity": "a penalty on outputs: Huber's function",
    "schedule": "a schedule: warmup, then the inverse square root",
    "adapter": "a recurrent cell with its adapter: an update-gate unit",
}
"""The kinds of distributions to write, each with the mathematics in it until its author puts in others."""

_FOLDER: Final = Path(__file__).with_name("templates")
_NAME: Final = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_LONGEST: Final = 32


def new(options: argparse.Namespace) -> int:
    """Write the distribution, and tell how to go on."""
    folder = Path(options.folder or options.name)
    print("wrote", *(f"  {path}" for path in scaffold(options.name, options.template, folder)), sep="\n")
    commands = (f"cd {shlex.quote(str(folder))}", 'python -m pip install -e ".[test]"', "python -m pytest")
    print("\nnow", *(f"  {command}" for command in commands), sep="\n")
    return 0


def scaffold(name: str, template: Template, folder: Path) -> list[Path]:
    """Write the distribution `name` into a folder, made where there is none. Returns the files, in order.

    For `regkit-nuclear`, the package is `regkit_nuclear`, the kind is `nuclear`, its class is `Nuclear` (of an adapter:
    `NuclearCell` and `NuclearAdapter`). What is written installs and passes its own tests as it is.

    Raises PluginError, and leaves nothing behind, for a name that cannot be used or is taken, for a folder that is not
    empty, and where writing fails.
    """
    if template not in TEMPLATES:
        raise PluginError(unknown("family", template, get_args(Template)))
    words = _words(name, template)
    _refuse_taken(words, template)
    texts = _texts(template)
    _refuse_imported(words, template, texts)
    made = {path: string.Template(text).substitute(words) for path, text in sorted(texts.items())}
    return _written(folder, {path.replace("PACKAGE", words["package"]): text for path, text in made.items()})


def _words(name: str, template: Template) -> dict[str, str]:
    """The words for which $word stands in the templates."""
    if not _NAME.fullmatch(name) or len(name) > _LONGEST:
        raise PluginError(
            f"a distribution is named in lower-case words with hyphens between, as 'regkit-nuclear', in at most "
            f"{_LONGEST} characters, not {name!r}"
        )
    kind = name.removeprefix("regkit-").replace("-", "_")
    return {
        "name": name,
        "package": name.replace("-", "_"),
        "kind": kind,
        "Class": "".join(part.capitalize() for part in kind.split("_")),
        "description": f"For regkit, {TEMPLATES[template]}.",
        "regkit": metadata.version(OWN),
        "year": str(date.today().year),
    }


def _refuse_taken(words: Mapping[str, str], template: Template) -> None:
    from regkit.registry.registry import default  # here, for it imports torch, and `regkit --help` reads TEMPLATES

    name, package, kind = words["name"], words["package"], words["kind"]
    if _installed(name):
        raise PluginError(f"a distribution {name!r} is installed already; choose another name")
    spec = None if package in sys.modules else importlib.util.find_spec(package)
    # A folder without code, such as the one to write into, has a spec too, but no origin.
    if package in sys.modules or (spec is not None and spec.origin is not None) or keyword.iskeyword(package):
        raise PluginError(f"{name!r} would need a package {package!r}, which Python has already; choose another name")
    if not kind[0].isalpha():
        raise PluginError(f"{name!r} would name its class {words['Class']!r}, and none begins so; choose another name")
    if template == "adapter":
        return
    if kind in RESERVED or keyword.iskeyword(words["Class"]):
        raise PluginError(f"{name!r} would name its kind {kind!r}, which no kind may be called; choose another name")
    if words["Class"] in ("I", "O"):  # which linters take for 1 and 0 (E742)
        raise PluginError(f"{name!r} would name its class {words['Class']}, which looks like a digit; choose another")
    entry = default().find(kind)
    if entry is not None:
        taken = f"{entry.origin} offers as a {entry.family}"
        raise PluginError(f"{name!r} would name its kind {kind!r}, which {taken}; choose another name")


def _installed(distribution: str) -> bool:
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _texts(template: Template) -> dict[str, str]:
    """The texts by their paths in the distribution."""
    texts: dict[str, str] = {}
    for part in (template, "every"):
        for path in _files(_FOLDER / part):
            where = path.relative_to(_FOLDER / part).as_posix().removesuffix(".tmpl")
            texts[where] = texts.get(where, "") + path.read_text(encoding="utf-8")
    return texts


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*.tmpl") if path.is_file())


def _refuse_imported(words: Mapping[str, str], template: Template, texts: Mapping[str, str]) -> None:
    """A class may not be called as something that its module imports."""
    lines = [line for text in texts.values() for line in text.splitlines() if line.startswith(("from ", "import "))]
    others = [line for line in lines if "$" not in line]  # the tests import the class itself
    if template != "adapter" and any(re.search(rf"\b{words['Class']}\b", line) for line in others):
        name, taken = words["name"], words["Class"]
        raise PluginError(f"{name!r} would name its class {taken}, as something that it imports; choose another name")


def _written(folder: Path, texts: Mapping[str, str]) -> list[Path]:
    """Write every text into the folder, or none. Returns the files."""
    existed = folder.exists()
    if existed and not folder.is_dir():
        raise PluginError(f"{folder} is a file; choose another folder")
    if existed and any(folder.iterdir()):
        raise PluginError(f"the folder {folder} is not empty; choose another one")
    paths = {folder / where: text for where, text in texts.items()}
    try:
        for path, text in paths.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        _clear(folder, existed)
        raise PluginError(f"cannot write {folder}: {error}") from error
    return list(paths)


def _clear(folder: Path, keep: bool) -> None:
    """Remove all files from a folder that was empty or did not exist."""
    for child in folder.iterdir() if folder.is_dir() else ():
        if child.is_dir():
            shutil.rmtree(child)
        else:
            child.unlink()
    if folder.is_dir() and not keep:
        folder.rmdir()
