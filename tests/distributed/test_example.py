"""The distributed example runs as docs/works-with.md says, and what it compares is equal."""

from __future__ import annotations

import importlib
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import regkit

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "examples/distributed.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
CPU = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.works_with("torchrun")
@pytest.mark.parametrize(("options", "way"), [([], "DDP"), (["--fsdp2"], "fully_shard")])
def test_the_distributed_example_comes_to_the_weights_of_one_process(options, way):
    command = [*TORCHRUN, EXAMPLE, "--steps", "20", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=CPU, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained by") == 1  # by the first process alone
    assert f"2 processes, {way}" in done.stdout
    assert "1 process " in done.stdout
    for rule in regkit.load(EXAMPLE.with_suffix(".json")).keyed_rules():
        assert rule in done.stdout
    difference = re.search(r"largest difference of a weight: (\S+)", done.stdout)
    assert difference is not None
    assert float(difference[1]) < 1e-6


def test_every_rule_of_the_distributed_example_has_a_share_in_what_is_compared(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    example = importlib.import_module("distributed")
    spec = json.loads(example.SPEC.read_text())
    expected = example.train(20).weights
    for left_out in spec["rules"]:
        monkeypatch.setattr(example, "SPEC", {**spec, "rules": [rule for rule in spec["rules"] if rule != left_out]})
        found = example.train(20).weights
        assert max(float((found[name] - weight).abs().max()) for name, weight in expected.items()) > 1e-4


def test_the_distributed_example_says_how_it_is_started(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE)])
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert stopped.value.code == 2
    assert "torchrun --nproc-per-node 2 examples/distributed.py" in capsys.readouterr().err
