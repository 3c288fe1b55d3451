"""What a command prints, and nothing that would change it."""

from __future__ import annotations

import pytest

from regkit.cli import main


def no_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """No say of the environment that runs the tests; for a fixture."""
    for name in ("REGKIT_PLUGINS", "REGKIT_DISABLE_PLUGINS", "REGKIT_STRICT_PLUGINS"):
        monkeypatch.delenv(name, raising=False)


def out(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    """What a command prints; nothing goes to standard error."""
    assert main(arguments) == status
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out
