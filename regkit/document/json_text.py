"""The text of a document, read within limits, with the line and column of each value.

`json` reads the values. The place of each value, and keys that came twice, are found by walking the tokens once more;
since `json` has accepted the text by then, the walk need not check the grammar.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from regkit.errors import Problem, SpecError, quoted

LARGEST_TEXT: Final = 4 * 2**20
"""The number of characters in a document. A rule takes some 200: there is room for 20,000 rules."""

DEEPEST: Final = 32
"""The depth of containers within containers. A spec needs 5."""

MOST_DIGITS: Final = 300
"""The number of digits in a whole number. One with more would not fit a float."""

_LONGEST_ORIGIN: Final = 200

_TOKENS: Final = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}:,]|[^\s\[\]{}:,"]+', re.DOTALL)


@dataclass(frozen=True)
class Source:
    """A document as plain JSON values, with the place of each value if there is a text.

    origin: the name of the document in errors. offsets: the index in the text of each value, by JSON Pointer.
    """

    origin: str
    value: Any
    text: str | None = None
    offsets: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def _line_ends(self) -> list[int]:
        return [match.start() for match in re.finditer("\n", self.text or "")]

    def problem(self, pointer: str, message: str) -> Problem:
        """A problem at a JSON Pointer, with the line and column of the value there, or of the nearest value around."""
        near = pointer
        while near and near not in self.offsets:
            near = near.rpartition("/")[0]
        if self.text is None or near not in self.offsets:
            return Problem(pointer, message)
        return self.problem_at(self.offsets[near], pointer, message)

    def problem_at(self, offset: int, pointer: str, message: str) -> Problem:
        """A problem at a JSON Pointer, with the line and column of an index in the text."""
        line = bisect_left(self._line_ends, offset)
        return Problem(pointer, message, line + 1, offset - (self._line_ends[line - 1] if line else -1))


def pointer(parts: Iterator[str | int] | tuple[str | int, ...]) -> str:
    """The JSON Pointer (RFC 6901) of a path."""
    return "".join(f"/{str(part).replace('~', '~0').replace('/', '~1')}" for part in parts)


def read(source: Any) -> Source:
    """Read the document in a path, a JSON text (a string that begins with a bracket) or plain values.

    Raises SpecError for anything but JSON, for keys given twice, and beyond LARGEST_TEXT, DEEPEST or MOST_DIGITS.
    """
    if isinstance(source, str) and source.lstrip("\ufeff \t\r\n")[:1] in ("{", "["):
        found = _parse("the given text", source.removeprefix("\ufeff"))
    elif isinstance(source, (str, Path)):
        found = _parse(_shortened(str(source)), _text_of(Path(source)))
    else:
        found = Source("the given document", source)
    _refuse_foreign(found)
    return found


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_ORIGIN else f"{name[:_LONGEST_ORIGIN]}…"


def _text_of(path: Path) -> str:
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise OSError(0, "neither a file nor a folder", str(path))  # a device or a pipe may never end
        size = path.stat().st_size
        if size > LARGEST_TEXT:
            raise _refusal(_shortened(str(path)), f"{size} bytes; a spec has at most {LARGEST_TEXT}")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise _refusal(_shortened(str(path)), f"not UTF-8 text: {error.reason} at byte {error.start}") from error
    except (OSError, ValueError) as error:  # ValueError: a path with a null character in it
        reason = getattr(error, "strerror", None) or str(error)
        looks_like_text = not path.suffix or any(one in str(path) for one in "\n:")
        hint = "; a JSON text begins with {: YAML is no JSON, and no comment goes before" if looks_like_text else ""
        raise _refusal(_shortened(str(path)), f"cannot read the file: {reason}{hint}") from error


def _parse(origin: str, text: str) -> Source:
    if len(text) > LARGEST_TEXT:
        raise _refusal(origin, f"{len(text)} characters; a spec has at most {LARGEST_TEXT}")
    try:
        value = json.loads(text, parse_int=_whole_number)
    except json.JSONDecodeError as error:
        reason = _why_not_json(text, error.pos) or error.msg
        raise SpecError(origin, [Problem("", f"not JSON: {reason}", error.lineno, error.colno)]) from None
    except RecursionError:
        value = None  # the walk says where the text is nested too deeply
    offsets: dict[str, int] = {}
    source = Source(origin, value, text, offsets)
    twice: list[Problem] = []
    for place, offset in _places(source, text):
        if offsets.setdefault(place, offset) != offset:
            twice.append(source.problem_at(offset, place, "this key is given twice"))
    if twice:
        raise SpecError(origin, twice)
    return source


def _why_not_json(text: str, at: int) -> str | None:
    """The reason why a text is not JSON from an index on, where that is a habit from another language."""
    rest, before = text[at : at + 40].lstrip(), text[:at].rstrip()
    if rest.startswith("'"):
        return "strings stand in double quotes"
    if rest.startswith(("//", "/*", "#")):
        return "there are no comments in JSON"
    if before.endswith(",") and rest[:1] in ("]", "}"):
        return f"no comma before the closing {rest[0]}"
    if rest.startswith(",") and rest[1:].lstrip()[:1] in ("]", "}"):
        return f"no comma before the closing {rest[1:].lstrip()[0]}"
    word = re.match(r"[A-Za-z_]\w*", rest)
    if word is not None and word[0] in _PYTHON:
        return f"{word[0]} of Python is {_PYTHON[word[0]]} in JSON"
    if word is not None and before.endswith(("{", ",")):
        return f'keys stand in double quotes: "{word[0][:20]}"'
    if text.lstrip("\ufeff \t\r\n")[:1] not in ("{", "["):
        return "a document is one object, which begins with {. Of YAML, json.dumps(yaml.safe_load(text)) makes JSON"
    return None


_PYTHON: Final = {"True": "true", "False": "false", "None": "null", "inf": "no number", "nan": "no number"}


def _whole_number(digits: str) -> int:
    # Beyond 4300 digits Python refuses to convert at all; any number too long stands for all of them.
    return int(digits) if len(digits) <= MOST_DIGITS else 10**MOST_DIGITS


def _refusal(origin: str, message: str) -> SpecError:
    return SpecError(origin, [Problem("", message)])


@dataclass
class _OpenContainer:
    """A container that is being walked: its path, and the key or index of the next value."""

    path: str
    is_object: bool
    key: str | None = None
    index: int = 0


def _places(source: Source, text: str) -> Iterator[tuple[str, int]]:
    """The pointer and offset of every value, in order; a key given twice gives its pointer twice."""
    stack: list[_OpenContainer] = []
    for match in _TOKENS.finditer(text):
        token = match[0]
        top = stack[-1] if stack else None
        if token in "]}":
            stack.pop()
        elif token == ",":
            assert top is not None
            top.key, top.index = None, top.index + 1
        elif token == ":":
            continue
        elif top is not None and top.is_object and top.key is None:
            top.key = json.loads(token)
        else:
            path = "" if top is None else top.path + pointer((top.index if top.key is None else top.key,))
            yield path, match.start()
            if token in "[{":
                stack.append(_OpenContainer(path, token == "{"))
            if len(stack) > DEEPEST:
                too_deep = f"nested deeper than {DEEPEST} levels"
                raise SpecError(source.origin, [source.problem_at(match.start(), path, too_deep)])


def _refuse_foreign(source: Source) -> None:
    """Refuse values that no JSON text could hold: other types, keys that are no strings, endless nesting."""
    problems: list[Problem] = []
    pending: list[tuple[tuple[str | int, ...], Any]] = [((), source.value)]
    deepest: dict[int, int] = {}  # by id: a container in many places is walked once for each greater depth
    while pending:
        path, item = pending.pop()
        if len(path) > DEEPEST:
            raise _refusal(source.origin, f"nested deeper than {DEEPEST} levels")
        if isinstance(item, (dict, list, tuple)):
            if deepest.get(id(item), -1) >= len(path):
                continue
            deepest[id(item)] = len(path)
        if type(item) is dict:
            bad = [key for key in item if type(key) is not str]
            problems += [source.problem(pointer(path), f"key {quoted(key)} is not a string") for key in bad]
            pending += [((*path, key), inner) for key, inner in item.items() if type(key) is str]
        elif type(item) in (list, tuple):
            pending += [((*path, index), inner) for index, inner in enumerate(item)]
        elif (reason := _foreign(item)) is not None:
            problems.append(source.problem(pointer(path), reason))
    if problems:
        raise SpecError(source.origin, problems[::-1])


def _foreign(item: Any) -> str | None:
    """The reason why a scalar is no JSON value, or None."""
    if type(item) is int and abs(item) >= 10**MOST_DIGITS:
        return f"a number of more than {MOST_DIGITS} digits"
    if item is None or type(item) in (str, int, float, bool):
        return None
    name = f"{type(item).__module__}.{type(item).__qualname__}".removeprefix("builtins.")
    return f"{name} is not a JSON value; give a plain number, string, list or object"
