"""`regkit plugins` and `regkit doctor`: what is installed, and what is wrong with it."""

from __future__ import annotations

import json
import re
from importlib import metadata
from pathlib import Path

import pytest

import regkit
from regkit import Registry
from regkit.cli import main
from regkit.cli.doctor import minimums
from tests.support.commands import no_policy, out
from tests.support.plugins.installing import PLUGIN, Install

ENTRIES = Registry().entries()
"""Of what is really installed."""

plain = pytest.fixture(no_policy, autouse=True)

HALF_BROKEN = (
    PLUGIN.format(name="nuclear", title="Nuclear")
    + """
@regkit.hookimpl
def regkit_schedules():
    raise RuntimeError("no schedules today")
"""
)

ADAPTER = """
import regkit
from torch import nn

class Mine(nn.Module): ...

class MineAdapter(regkit.Adapter):
    modules = (Mine, "not_installed.cells:Cell")

    def weights(self, module): return []
    def outputs(self, module): return []
    def observe(self, module, args, kwargs, result): return {}
    def segments(self, module, site, observed, valid, step): return []

@regkit.hookimpl
def regkit_adapters(): return [MineAdapter()]
"""


@pytest.fixture
def zoo(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plugins of every state."""
    install("Regkit.Good", "1.2", "good_plugin", PLUGIN.format(name="good", title="Good"), {"good": "good_plugin"})
    install("regkit-cells", "0.3", "cells_plugin", ADAPTER)
    install("regkit-broken", "3.1", "broken_plugin", HALF_BROKEN)
    install("regkit-blocked", "9", "blocked_plugin", "1 / 0")
    monkeypatch.setenv("REGKIT_DISABLE_PLUGINS", "regkit-blocked")


@pytest.mark.usefixtures("zoo")
def test_plugins_is_a_table_of_what_is_installed_and_why_some_is_not_in_use(capsys):
    lines = out(capsys, "plugins").splitlines()
    header, _, *rows = (re.split(r" {2,}", line) for line in lines)
    assert header == ["distribution", "version", "entry point", "state", "offers", "place"]
    assert ["Regkit.Good", "1.2", "good", "loaded", "good", "good_plugin"] in rows
    assert ["regkit-cells", "0.3", "cells_plugin", "loaded", "Mine, Cell", "cells_plugin"] in rows
    assert ["regkit-broken", "3.1", "broken_plugin", "broken", "nuclear", "broken_plugin"] in rows
    assert ["regkit-blocked", "9", "blocked_plugin", "blocked", "blocked_plugin"] in rows  # nobody knows what it offers
    assert ["torch-regkit", regkit.__version__, "norms", "loaded", "l1, l2, l1_l2", "regkit_standard.l1_l2"] in rows
    reasons = " ".join("\n".join(lines).split())
    assert "regkit-blocked 9 (blocked_plugin) is blocked: REGKIT_DISABLE_PLUGINS names it" in reasons
    assert "plugin regkit-broken 3.1: regkit_schedules failed: RuntimeError('no schedules today')" in reasons


@pytest.mark.usefixtures("zoo")
def test_plugins_as_json_hold_everything_under_the_same_keys(capsys):
    told = {one["entry_point"]: one for one in json.loads(out(capsys, "plugins", "--json"))}
    keys = ["distribution", "version", "entry_point", "place", "state", "reason", "traceback", "kinds", "adapters"]
    assert all(list(one) == keys for one in told.values())
    assert [told[name]["state"] for name in ("good", "broken_plugin", "blocked_plugin")] == [
        "loaded",
        "broken",
        "blocked",
    ]
    (good,) = told["good"]["kinds"]
    file = Path(good.pop("file"))
    line = file.read_text().splitlines()[good.pop("line") - 1]
    assert (file.name, line) == ("good_plugin.py", "class Good(regkit.Penalty):")
    assert good == {"name": "good", "family": "penalty", "class": "good_plugin:Good", "meaning": "The sum of good."}
    assert told["cells_plugin"]["adapters"] == ["Mine", "Cell"]
    broken = told["broken_plugin"]
    assert 'raise RuntimeError("no schedules today")' in broken["traceback"]
    assert "no schedules today" in broken["reason"]
    (nuclear,) = broken["kinds"]
    assert list(nuclear) == ["name", "family", "class", "meaning", "file", "line"]
    assert nuclear["name"] == "nuclear"
    assert told["norms"]["kinds"][0]["file"].endswith("l1_l2.py")


@pytest.mark.usefixtures("zoo")
def test_requirements_pin_each_distribution_in_use_once(capsys):
    pins = out(capsys, "plugins", "--requirements").splitlines()
    assert pins == ["regkit-cells==0.3", "Regkit.Good==1.2", f"torch-regkit=={regkit.__version__}"]


@pytest.mark.usefixtures("zoo")
def test_broken_shows_tracebacks_and_fails(capsys):
    told = out(capsys, "plugins", "--broken", status=1)
    assert told.startswith("plugin regkit-broken 3.1: regkit_schedules failed: RuntimeError('no schedules today')")
    assert "Traceback (most recent call last)" in told
    assert re.search(r'File ".*broken_plugin\.py", line \d+, in regkit_schedules', told)
    assert "regkit-blocked" not in told


def test_where_nothing_is_broken_that_is_said(capsys):
    assert out(capsys, "plugins", "--broken") == "no plugin is broken\n"


def test_only_one_view_of_the_plugins_at_a_time(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["plugins", "--json", "--requirements"])
    assert caught.value.code == 2
    assert "not allowed with" in capsys.readouterr().err


def test_a_policy_that_names_nothing_is_a_warning_beside_the_table(capsys, monkeypatch):
    monkeypatch.setenv("REGKIT_DISABLE_PLUGINS", "normz")
    assert main(["plugins"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("distribution")
    assert captured.err.startswith("regkit: warning: REGKIT_DISABLE_PLUGINS names 'normz'")
    assert captured.err.count("\n") == 1


@pytest.mark.usefixtures("zoo")
def test_what_is_printed_fits_a_terminal(capsys):
    for command in (["kinds"], ["plugins"], ["doctor"], *(["kinds", entry.name] for entry in ENTRIES)):
        main(command)
        for line in capsys.readouterr().out.splitlines():
            whole = line.startswith(("  file", "  python", "  regkit"))  # paths
            assert len(line) <= 100 or whole, (command, line)


def test_a_sound_installation_has_no_problems(capsys):
    told = out(capsys, "doctor")
    assert told.endswith("\nno problems found\n")
    for name in ("torch", "pydantic", "pluggy", "numpy"):
        assert re.search(rf"^  {name} +{re.escape(metadata.version(name))}$", told, re.MULTILINE)
    installed = {one for one in ("lightning", "transformers", "accelerate", "skorch") if _there(one)}
    assert installed == {one for one in ("lightning", "transformers", "accelerate", "skorch") if f"\n  {one} " in told}
    assert "REGKIT_PLUGINS          not set" in told
    assert f"plugins: {len(Registry().plugins)} loaded\n" in told


def _there(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


@pytest.mark.usefixtures("zoo")
def test_the_doctor_counts_what_is_broken_and_not_what_is_blocked(capsys):
    told = out(capsys, "doctor", status=1)
    assert re.search(r"^plugins: \d+ loaded, 1 blocked, 1 broken$|^plugins: 1 blocked", told, re.MULTILINE)
    assert "REGKIT_DISABLE_PLUGINS  'regkit-blocked': these are not imported" in told
    assert "regkit-blocked 9 (blocked_plugin) is blocked: REGKIT_DISABLE_PLUGINS names it" in told
    assert "problem: plugin regkit-broken 3.1: regkit_schedules failed: RuntimeError('no schedules today')" in told
    assert told.endswith("\n1 problem found\n")


def test_the_doctor_survives_a_clash_and_shows_who_is_in_it(install, capsys):
    install("first-one", "1.0", "first_plugin", PLUGIN.format(name="nuclear", title="A"))
    install("second-one", "2.5", "second_plugin", PLUGIN.format(name="nuclear", title="B"))
    install("third-one", "0.1", "third_plugin", PLUGIN.format(name="l2", title="C"))
    install("regkit-broken", "3.1", "broken_plugin", "1 / 0")
    told = out(capsys, "doctor", status=1)
    problems = [" ".join(one.split()) for one in re.findall(r"^problem: (.*(?:\n  .*)*)", told, re.MULTILINE)]
    assert len(problems) == 3
    assert problems[0].startswith("two plugins offer the kind 'nuclear': first-one 1.0")
    assert "third-one 0.1" in problems[1]
    assert problems[2].startswith("plugin 'broken_plugin' of regkit-broken 3.1 does not import: ZeroDivisionError")
    assert re.search(r"^first-one +1\.0 +first_plugin +loaded +nuclear +first_plugin$", told, re.MULTILINE)
    assert told.endswith("\n3 problems found\n")


def test_the_doctor_of_a_strict_environment_counts_a_broken_plugin_once(install, monkeypatch, capsys):
    install("regkit-broken", "3.1", "broken_plugin", "1 / 0")
    monkeypatch.setenv("REGKIT_STRICT_PLUGINS", "1")
    assert main(["plugins"]) == 1
    assert "REGKIT_STRICT_PLUGINS is 1" in capsys.readouterr().err
    told = out(capsys, "doctor", status=1)
    assert told.count("problem: ") == 1
    assert "Traceback" not in told
    assert told.endswith("\n1 problem found\n")


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("REGKIT_STRICT_PLUGINS", "yes", "REGKIT_STRICT_PLUGINS is 1 or 0, not 'yes'"),
        ("REGKIT_PLUGINS", "nuclaer", "REGKIT_PLUGINS names 'nuclaer', which no installed plugin is"),
        ("REGKIT_DISABLE_PLUGINS", "normz", "REGKIT_DISABLE_PLUGINS names 'normz', which no installed plugin is"),
    ],
)
def test_the_doctor_tells_what_is_wrong_with_the_policy(name, value, sentence, monkeypatch, capsys):
    monkeypatch.setenv(name, value)
    told = out(capsys, "doctor", status=1)
    assert f"problem: {sentence}" in told
    assert told.count("problem: ") == 1
    assert f"'{value}': " in told


def test_where_the_policy_cannot_be_read_the_doctor_imports_nothing(install, monkeypatch, capsys):
    install("regkit-trap", "1.0", "trap_plugin", "raise SystemExit('imported')")
    monkeypatch.setenv("REGKIT_STRICT_PLUGINS", "yes")
    told = out(capsys, "doctor", status=1)
    assert re.search(r"^regkit-trap +1\.0 +trap_plugin +blocked +trap_plugin$", told, re.MULTILINE)
    assert "imported" not in told.replace("may be imported", "").replace("these are not imported", "")


def test_the_doctor_finds_what_is_too_old(tmp_path, monkeypatch, capsys):
    for name, version in (("pluggy", "1.4.9"), ("numpy", "1.100"), ("pydantic", "2.10rc1")):
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    told = out(capsys, "doctor", status=1)
    assert "problem: pluggy 1.4.9 is installed, and regkit works with 1.5 or later" in told
    assert "problem: pydantic 2.10rc1 is installed, and regkit works with 2.10 or later" in told
    assert told.endswith("\n2 problems found\n")  # 1.100 is later than 1.26


def test_every_version_that_regkit_asks_for_is_compared():
    needed, wanted = minimums()
    always = [one for one in metadata.requires("torch-regkit") or () if ";" not in one]
    assert {f"{name}>={minimum}" for name, minimum in needed.items()} == set(always)
    assert not set(wanted) & set(needed)


def test_the_doctor_sees_that_another_version_was_installed(monkeypatch, capsys):
    monkeypatch.setattr(regkit, "__version__", "99.0")
    told = out(capsys, "doctor", status=1)
    recorded = metadata.version("torch-regkit")
    assert f"problem: torch-regkit 99.0 runs, where {recorded} was installed: install it anew" in told
