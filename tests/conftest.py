"""The fixtures that all tests share, pytest's rewriting of assertions in helpers, and what torch warns of itself."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("tests.support", "tests.mutants")  # before any of them is imported
pytest_plugins = ["tests.support.fixtures"]


def pytest_configure(config: pytest.Config) -> None:
    """Pass over the warnings that the torch at hand gives of its own code."""
    from tests.support.versions import WARNS_OF_ITSELF  # once assertions in helpers are rewritten

    for ignored in WARNS_OF_ITSELF:
        config.addinivalue_line("filterwarnings", ignored)
