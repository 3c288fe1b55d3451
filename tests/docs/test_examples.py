"""The examples run, and what they show is true."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import regkit

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
def test_the_language_model_trains_with_every_document_and_shows_what_it_got(tmp_path):
    command = [sys.executable, "-W", "error", EXAMPLES / "word_lm.py", "--tiny", "--json", tmp_path / "numbers.json"]
    done = subprocess.run([*command, "--picture", tmp_path / "curves.png"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    for spec in (EXAMPLES / "specs").glob("*.json"):
        assert spec.stem in done.stdout
    assert json.loads((tmp_path / "numbers.json").read_text())


def test_the_model_of_the_example_knows_nothing_of_regkit():
    text = (EXAMPLES / "word_lm.py").read_text(encoding="utf-8")
    model = text[text.index("class WordLM") : text.index("def one_epoch")]
    assert "regkit" not in model


def test_the_plan_of_every_document_binds_the_language_model():
    done = subprocess.run(
        [sys.executable, EXAMPLES / "word_lm.py", "--tiny", "--plan"], capture_output=True, text=True, check=True
    )
    for spec in sorted((EXAMPLES / "specs").glob("*.json")):
        assert spec.name in done.stdout
        for key in regkit.load(spec).keyed_rules():
            assert key in done.stdout
