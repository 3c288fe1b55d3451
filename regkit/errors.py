"""Every error that regkit raises, and the sentences of which errors are made.

An error says what was given, what exists, and the nearest name. Where several things are wrong at once, all of
them are told: such an error carries one `Problem` for each.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

from regkit.vocabulary import in_these_words

_MOST_PROBLEMS = 100
_MOST_NAMES = 24  # an error that lists hundreds of names hides the one that matters
_LONGEST_LINE: Final = 4000
_LONGEST_NAME: Final = 200
_echo: Final = reprlib.Repr()
_echo.maxstring = _echo.maxother = _echo.maxlong = 80
_hints_left: ContextVar[list[int] | None] = ContextVar("hints_left", default=None)


def printable(text: str, longest: int = _LONGEST_LINE) -> str:
    """A text as one line of a terminal, with the escapes of `repr` for all characters that are not printed as such.

    These are controls, line ends, changes of the direction of writing, and characters that take no room. Names come
    from documents, models, files and plugins: none may write lines of its own, or look like another.

    longest: the number of characters to which the text is cut.
    """
    line = text if len(text) <= longest else f"{text[:longest]}…"
    if line.isprintable():
        return line
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in line)


class _Lines(Exception):  # noqa: N818  # the common base of errors and warnings
    """An error or a warning told in lines, of which each argument is one."""

    def __str__(self) -> str:
        return "\n".join(printable(str(line)) for line in self.args)


class RegkitError(_Lines):
    """The root of all errors that regkit raises as documents are read, resolved, attached and trained with.

    Models of the document that Python code makes by hand, such as `Rule(...)`, raise pydantic's ValidationError.

    >>> try:
    ...     regkit.load("no document")
    ... except regkit.RegkitError as error:
    ...     print(type(error).__name__)
    SpecError
    """


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and where: a JSON Pointer (RFC 6901) into a document, or the key of a rule.

    where: empty for the whole document.
    message: a sentence without its place.
    line, column: the place in the text, counted from 1; None where the document came as a dict.

    >>> print(regkit.Problem("/rules/0", "names no kind", line=3, column=5))
    line 3, column 5: /rules/0: names no kind
    """

    where: str
    message: str
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        place = "" if self.line is None else f"line {self.line}, column {self.column}: "
        return f"{place}{printable(self.where, _LONGEST_NAME) or '(document)'}: {printable(self.message)}"


class _ProblemsError(RegkitError):
    """All problems found in one document."""

    verb = "wrong"

    def __init__(self, origin: str, problems: Sequence[Problem]) -> None:
        self.origin = origin
        """The name of what is wrong: the path of a document, or words such as "the given text"."""
        self.problems = tuple(problems)
        """Every problem, in order."""
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        told = list(map(str, self.problems[:_MOST_PROBLEMS]))
        if len(told) < len(self.problems):
            told.append(f"and {len(self.problems) - len(told)} more (all are in .problems)")
        super().__init__(f"{printable(origin, _LONGEST_NAME)} {self.verb}: {count}", *(f"  {one}" for one in told))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.origin, self.problems), vars(self)


class SpecError(_ProblemsError, ValueError):
    """A document that regkit cannot read as a spec: `problems` holds every mistake, and where each one is.

    >>> try:
    ...     regkit.load({"rules": [{"penalty": "l3(1)"}]})
    ... except regkit.SpecError as error:
    ...     print(error.problems[0].where)
    /rules/0/penalty
    """

    verb = "is not a valid spec"


class ResolveError(_ProblemsError, LookupError):
    """A valid document that does not fit the model: a rule that binds nothing, a gate of another cell.

    >>> try:
    ...     regkit.resolve(nn.GRU(2, 3), {"rules": [{"penalty": "l2(1)", "target": {"gate": "forget"}}]})
    ... except regkit.ResolveError as error:
    ...     print(len(error.problems))
    1
    """

    verb = "does not fit the model"


class PluginError(RegkitError):
    """A plugin that cannot be used, as when its import fails, an offered class is no kind, or its names clash.

    >>> try:
    ...     regkit.register(nn.LSTM)
    ... except regkit.PluginError as error:
    ...     print("refused")
    refused
    """


class RegkitWarning(_Lines, UserWarning):
    """A fact that is no error and that a user should know: rules act on something else than one may expect.

    >>> import warnings
    >>> cell = nn.GRUCell(2, 3)
    >>> attachment = regkit.attach(cell, {"rules": [{"penalty": "temporal(1)"}]})
    >>> h = cell(torch.ones(1, 2))
    >>> h = cell(torch.ones(1, 2), 0.5 * h)
    >>> with warnings.catch_warnings(record=True) as told:
    ...     warnings.simplefilter("always")
    ...     penalty = attachment.penalty()
    >>> told[0].category.__name__
    'RegkitWarning'
    """


class PluginWarning(RegkitWarning):
    """A plugin that cannot be used, as long as no document asks for its kinds or adapters.

    >>> import warnings
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore", regkit.PluginWarning)
    ...     registry = regkit.Registry()
    """


class AttachError(RegkitError, ValueError):
    """A plan that cannot be put on this model.

    >>> lstm = nn.LSTM(2, 3)
    >>> _ = lstm.weight_hh_l0.data.fill_(float("nan"))
    >>> try:
    ...     attachment = regkit.attach(lstm, {"rules": [{"penalty": "l2(0.1)"}]})
    ... except regkit.AttachError as error:
    ...     print("refused")
    refused
    """


class _CopyError(RegkitError, TypeError):
    """A copy of an attachment, which belongs to one model: a TypeError, as of all that Python cannot pickle."""


class StepError(RegkitError, RuntimeError):
    """A training step in which something the document demands would not have been optimized.

    >>> lstm, x = nn.LSTM(2, 3), torch.ones(4, 1, 2)
    >>> with regkit.attach(lstm, {"rules": [{"penalty": "activity_l2(0.1)"}]}) as attachment:
    ...     try:
    ...         with attachment.lengths([9]):
    ...             loss = lstm(x)[0].sum() + attachment.penalty()
    ...     except regkit.StepError as error:
    ...         print(error)
    lengths() was given a length of 9 for 4 time steps
    """


@contextmanager
def few_hints() -> Iterator[None]:
    """A context in which a hundred nearest names are looked for at most.

    A document may hold a hundred thousand mistakes. To look for a name takes a while, and a hundred are told.
    """
    token = _hints_left.set([_MOST_PROBLEMS])
    try:
        yield
    finally:
        _hints_left.reset(token)


def hints_left() -> bool:
    """Whether a name may still be looked for. Sentences for thousands of mistakes are brief without."""
    left = _hints_left.get()
    return left is None or left[0] > 0


def spend_hint() -> None:
    """Note that a sentence was made at length."""
    if (left := _hints_left.get()) is not None:
        left[0] -= 1


def nearest(given: str, known: Iterable[str]) -> str | None:
    """The known name most like the given one, None where all are too different.

    >>> nearest("unitnorm", ["l1", "max_norm", "unit_norm"])
    'unit_norm'
    """
    if not hints_left() or len(given) > _LONGEST_NAME:
        return None
    spend_hint()
    names = sorted(name for name in known if len(name) > 1 or len(given) == 1)  # a letter is like everything
    by_fold = {name.casefold(): name for name in names}
    close = difflib.get_close_matches(given.casefold(), list(by_fold), n=1, cutoff=0.75)
    return by_fold[close[0]] if close else None


def hint(
    given: object, known: Collection[str], otherwise: str = ".", place: str = "", foreign: str | None = None
) -> str:
    """The end of a sentence about a name that does not exist: the nearest known one, or `otherwise`.

    place: what the name is of, as `role`: a word of another library is then told in the words of a document.
    foreign: a sentence on the name, which goes before.

    >>> hint("kernal", ["kernel", "bias"])
    "; did you mean 'kernel'?"
    """
    foreign = foreign or (in_these_words(place, given, known) if place and isinstance(given, str) else None)
    if not isinstance(given, str) or foreign:
        spend_hint()
        return f": {foreign}." if foreign else otherwise
    near = nearest(given, known)
    return f"; did you mean {near!r}?" if near else otherwise


def quoted(value: object) -> str:
    """A value as Python writes values, shortened.

    >>> len(quoted("x" * 10**6))
    80
    """
    return _echo.repr(value)


def listing(names: Iterable[str]) -> str:
    """Names in order, for a sentence: at most a few dozen, then how many more."""
    ordered = list(dict.fromkeys(names))
    shown = ", ".join(name[:_LONGEST_NAME] for name in ordered[:_MOST_NAMES]) or "none"
    return shown if len(ordered) <= _MOST_NAMES else f"{shown} and {len(ordered) - _MOST_NAMES} more"


def unknown(what: str, given: str, known: Iterable[str]) -> str:
    """The sentence for a name that does not exist.

    >>> unknown("role", "kernal", ["kernel", "bias"])
    "unknown role 'kernal'; did you mean 'kernel'? Available: kernel, bias"
    """
    names = list(known) if hints_left() else []
    if not names:
        return f"unknown {what} {quoted(given)}"
    return f"unknown {what} {quoted(given)}{hint(given, names, place=what)} Available: {listing(names)}"
