"""The fixtures that all tests share, pytest's rewriting of the assertions in helpers, and marks by torch's version."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("tests.support", "tests.mutants")  # before any of them is imported
pytest_plugins = ["tests.support.fixtures"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that the torch at hand cannot pass."""
    from tests.support.versions import IGNORED, older_than, too_old_for  # once assertions in helpers are rewritten

    for item in items:
        if older_than("2.13"):
            item.add_marker(pytest.mark.filterwarnings(IGNORED))
        if reason := too_old_for(item.name):
            item.add_marker(pytest.mark.skip(reason=reason))
