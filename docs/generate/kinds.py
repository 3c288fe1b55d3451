"""The page of the kinds: the manuals of `regkit kinds KIND`, in Markdown."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from typing import Final

from docs.docstrings import markdown
from docs.generate.markdown import table
from regkit import Registry
from regkit.cli.kinds import options_of
from regkit.cli.manual import acts, document, option_rows, shorthand
from regkit.registry.entries import Entry
from regkit.registry.names import FAMILIES, Family

_WIDTH: Final = 84
"""The columns of a block that the site shows whole."""

_INTRODUCTION: Final = """# Kinds

Every kind that comes with regkit. `regkit kinds` lists them together with those of the plugins that are installed, and
`regkit kinds KIND` is the manual of one. In a document a kind is an object with its options, `{"kind": "l2",
"strength": 1e-4}`, a string, `"l2(1e-4)"`, or one key, `{"l2": 1e-4}`.
"""

_OF_A_FAMILY: Final[dict[Family, str]] = {
    "penalty": """## Penalties on weights

The formula is the value at strength 1; a rule's schedule multiplies the strength. [The training loop](training-loop.md)
says what `via` means.""",
    "activity penalty": """## Penalties on activities

The formula is the value at strength 1, over the valid elements: padding is left out. `reduction` is `mean` (the
default), `batch` (the sum of all, divided by the batch, as Keras ≥ 3.14) or `sum`.""",
    "constraint": """## Constraints on weights

A constraint is a set, into which weights are put back after each optimizer step. `per` says what a group is: `unit`
(the default), the incoming weights of each gate unit, a torch row (Keras `axis=0`); `input`, a column (Keras `axis=1`);
`cell`, all gate rows of one hidden unit together; `matrix`. Of a bias, a unit is one scalar.""",
    "schedule": """## Schedules

A factor by the optimizer step t, counted from 0. It multiplies a penalty's strength or a constraint's bound. A bound
may not reach 0: every weight would.""",
}


def kinds() -> str:
    """The page, of the kinds that regkit itself brings, whatever else is installed."""
    registry = Registry(allow=())
    return "\n".join([_INTRODUCTION, *(_family(family, registry.entries(family)) for family in FAMILIES)])


def _family(family: Family, entries: list[Entry]) -> str:
    rows = [[f"[`{entry.name}`](#{entry.name})", options_of(entry), entry.meaning] for entry in entries]
    parts = [_OF_A_FAMILY[family], table([family, "options", "formula"], rows), *map(_kind, entries)]
    return "\n\n".join(parts) + "\n"


def _kind(entry: Entry) -> str:
    example = entry.kind.examples()[0]
    parts = [f"### {entry.name}", markdown(inspect.cleandoc(entry.kind.__doc__ or "")).strip()]
    if rows := [[f"`{name}`", *others] for name, *others in option_rows(entry)]:
        parts.append(table(["option", "type", "default", "meaning"], rows))
    parts += ["\n".join(_facts(entry)), f"```json\n{document(entry, example, _WIDTH)}\n```"]
    if (short := shorthand(example)) is not None:
        bare = ", ".join(f"`{name}`" for name in entry.kind.shorthand)
        order = f"; options without a name stand in this order: {bare}" if bare else ""
        parts.append(f"In short: `{json.dumps(short)}`{order}.")
    return "\n\n".join(parts)


def _facts(entry: Entry) -> Iterator[str]:
    """How a kind acts, and where its mathematics stands."""
    yield from (f"- **{name}**: {text}" for name, text in acts(entry.kind))
    yield f"- **source**: `{entry.kind.__module__}.{entry.kind.__qualname__}`"
