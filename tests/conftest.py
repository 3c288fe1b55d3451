"""The fixtures that all tests share, and pytest's rewriting of the assertions in helpers."""

import pytest

pytest.register_assert_rewrite("tests.support", "tests.mutants")  # before any of them is imported
pytest_plugins = ["tests.support.fixtures"]
