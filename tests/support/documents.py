"""Documents for the tests of how mistakes in them are told."""

import pytest

import regkit


def marked(text):
    """A text without its mark ¶, and the line and column of the mark."""
    before, _, after = text.partition("¶")
    return before + after, before.count("\n") + 1, len(before) - before.rfind("\n")


def rule(parts):
    """A document with one rule, some lines down."""
    return '{"version": 1,\n\n "rules": [\n  ' + parts + "]}"


def layer(parts):
    return '{"layers":\n [' + parts + "]}"


def problems(document, **options):
    with pytest.raises(regkit.SpecError) as caught:
        regkit.load(document, **options)
    for problem in caught.value.problems:
        assert str(problem) in str(caught.value)
    return caught.value.problems


L2 = '"penalty": {"kind": "l2", "strength": 1}'


def on(target):
    return rule('{"target":\n {' + target + "}, " + L2 + "}")


def penalty(options):
    return rule('{"penalty":\n {' + options + "}}")
