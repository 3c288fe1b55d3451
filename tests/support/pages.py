"""Pages of documentation as a reader would use them: fenced blocks, run in order and compared with the page's output.

- `python` runs in the page's module; with a title, `python title="shop.py"`, it is also a file of the page's folder.
- `json` is a document: it loads and passes the JSON Schema; with a title it is a file, too.
- `bash`: each `regkit …` line is run in that folder; a command that fails must show its message.
- `text` right after `python` or `bash` is what that printed, in lines of any width; `…` stands for anything.

A block after `<!-- slow -->` runs in slow tests alone.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import jsonschema

import regkit
from regkit.cli import main
from regkit.kinds import Kind
from regkit.registry.registry import default

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = ROOT / "docs"

_FENCE = re.compile(
    r'^(?P<slow><!-- slow -->\n)?```(?P<language>\w*)(?: title="(?P<title>[^"\n]+)")?\n(?P<code>.*?)^```$',
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, title and code, the number of lines above the code, and where the block stands."""

    language: str
    title: str | None
    code: str
    above: int
    slow: bool
    adjoins: bool
    """Nothing stands between this block and the one before."""


def blocks(page: Path, language: str | None = None) -> list[Block]:
    """The fenced blocks of a page, in order; of one language alone, where it is given."""
    text = page.read_text(encoding="utf-8")
    found, end = [], 0
    for match in _FENCE.finditer(text):
        slow, adjoins = match["slow"] is not None, not text[end : match.start()].strip()
        above = text.count("\n", 0, match.start("code"))
        found.append(Block(match["language"], match["title"], match["code"], above, slow, adjoins))
        end = match.end()
    assert len(found) * 2 == len(re.findall(r"^```", text, re.MULTILINE)), f"{page.name}: an unknown kind of fence"
    return [block for block in found if language in (None, block.language)]


def block_with(page: Path, language: str, words: str) -> str:
    """The code of the only block of this language in which these words stand."""
    (block,) = [block for block in blocks(page, language) if words in block.code]
    return block.code


def first_column(page: Path, header: str) -> list[str]:
    """The names in the first column of the page's table whose first header cell this is."""
    pattern = rf"^\| {re.escape(header)} \|.*\n\|[ |-]+\n((?:\|.*\n)+)"
    table = re.search(pattern, page.read_text(encoding="utf-8"), re.MULTILINE)
    assert table, header
    return re.findall(r"^\| `([\w.]+)`", table[1], re.MULTILINE)


def run_page(page: Path, folder: Path, slow: bool = False) -> None:
    """Run a page's blocks in order, in a folder and a module of its own, and compare what they print."""
    every = blocks(page)
    with _module(page, folder) as module:
        for block, after in zip(every, [*every, None][1:], strict=True):
            if block.slow and not slow:
                continue
            shown = after if after is not None and after.language == "text" and after.adjoins else None
            told = _run(page, block, module, folder, shown is not None)
            if shown is not None and block.language in ("python", "bash"):
                _compare(page, shown, told)


@contextmanager
def _module(page: Path, folder: Path) -> Iterator[ModuleType]:
    """A module for the page's code, known as others are; modules that the page has written are forgotten again."""
    module = ModuleType(f"page_{page.stem.replace('-', '_').lower()}")
    module.__file__ = str(page)
    sys.modules[module.__name__] = module
    before = list(sys.path)
    try:
        yield module
    finally:
        sys.path[:] = before  # `regkit plan` puts the current folder in front
        del sys.modules[module.__name__]
        for path in folder.glob("*.py"):
            sys.modules.pop(path.stem, None)


@contextmanager
def _chdir(folder: Path) -> Iterator[None]:
    """Another current folder (`contextlib.chdir` is in Python from 3.11 on)."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _run(page: Path, block: Block, module: ModuleType, folder: Path, shown: bool) -> str:
    """The output of a block, which must be shown on the page where a command fails."""
    if block.title is not None:
        (folder / block.title).write_text(block.code, encoding="utf-8")
    told = io.StringIO()
    with _chdir(folder), redirect_stdout(told):
        if block.language == "python":
            # The lines above are blank: an error, and whoever asks for a class's source, finds the line of the page.
            exec(compile("\n" * block.above + block.code, page, "exec", dont_inherit=True), vars(module))
        elif block.language == "json":
            regkit.load(block.code)
            _validator(tuple(entry.kind for entry in default().entries())).validate(json.loads(block.code))
        elif block.language == "bash":
            with redirect_stderr(told):
                for command in re.findall(r"^regkit (.+)$", block.code, re.MULTILINE):
                    assert main(shlex.split(command)) == 0 or shown, f"{page.name}: regkit {command}: {told.getvalue()}"
    return told.getvalue()


@cache
def _validator(kinds: tuple[type[Kind], ...]) -> jsonschema.Draft202012Validator:
    """A validator by the JSON Schema with these kinds, which are those of the registry now."""
    return jsonschema.Draft202012Validator(regkit.schema())


def _compare(page: Path, shown: Block, told: str) -> None:
    """Hold what a page shows against what was printed; a page may break lines elsewhere."""
    wanted, said = " ".join(shown.code.split()), " ".join(told.split())
    pattern = ".*".join(map(re.escape, wanted.split("…")))
    assert re.fullmatch(pattern, said), f"{page.name}, line {shown.above}, shows\n{shown.code}\n--- but\n{told}"
