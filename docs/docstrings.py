"""regkit's docstrings as Markdown. This file stands alone: the site's build runs it where regkit is not installed."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final

_FENCED: Final = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_CODE: Final = re.compile(r"(`[^`]*`)")
_NAMED: Final = re.compile(r"(\w+(?:, \w+)*): (?=\S)")
_FLAG: Final = re.compile(r" *# doctest:.*")


def markdown(docstring: str, names: Collection[str] | None = None) -> str:
    """A docstring as Markdown: lines such as `lr: the learning rate` become a list, doctests become blocks of code.

    names: those that may begin an item of a list, such as a function's parameters; left out, every name may. The first
    line is a sentence, whatever begins it.
    """
    first, _, rest = docstring.partition("\n")
    parts = _FENCED.split(rest)
    parts[::2] = [_text(part, names) for part in parts[::2]]
    return "\n".join([escaped(first), "".join(parts)])


def escaped(text: str) -> str:
    """The text with `<` and `*` as themselves, but for code, in which they are so anyway."""
    parts = _CODE.split(text)
    parts[::2] = [part.replace("<", "&lt;").replace("*", "\\*") for part in parts[::2]]
    return "".join(parts)


def _text(text: str, names: Collection[str] | None) -> str:
    return re.sub(r"(?:.+\n?)+", lambda paragraph: _paragraph(paragraph[0], names), text)


def _paragraph(text: str, names: Collection[str] | None) -> str:
    if text.startswith(">>>"):
        return f"```pycon\n{_FLAG.sub('', text).rstrip()}\n```\n"
    before: list[str] = []
    items: list[str] = []
    ended = True
    for line in escaped(text).splitlines():
        if ended and (named := _named(line, names)):
            items.append(f"- **`{named[1]}`**: {line[named.end() :]}")
        elif items:
            items.append(f"  {line.strip()}")
        else:
            before.append(line)
        ended = line.endswith((".", ":", ";", ")", "?"))  # else the next line goes on with the sentence
    return "\n".join([*before, *([""] if before and items else []), *items, ""])


def _named(line: str, names: Collection[str] | None) -> re.Match[str] | None:
    """The names that a line begins with and tells of, if these are such."""
    found = _NAMED.match(line)
    return found if found and (names is None or set(found[1].split(", ")) <= set(names)) else None
