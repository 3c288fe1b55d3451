"""Distributions of plugins, installed where the tests can see them and nothing else can."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

_BUILD = "import sys, hatchling.build as backend; print(backend.build_wheel(sys.argv[1]))"


def run(python: Path | str, *arguments: object, cwd: Path, **environment: str) -> str:
    """What a Python process prints; its failure is the test's."""
    there = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [str(python), *map(str, arguments)],
        cwd=cwd,
        env=there,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def wheel(source: Path, folder: Path) -> Path:
    """The wheel of a source tree, built by its own backend into a folder."""
    pytest.importorskip("hatchling")
    folder.mkdir(exist_ok=True)
    return folder / run(sys.executable, "-c", _BUILD, folder, cwd=source).splitlines()[-1]


def unpack(source: Path, site: Path) -> None:
    """Install a source tree into a folder: what a wheel has is what an installer would put there."""
    with zipfile.ZipFile(wheel(source, site.with_name(f"{site.name}-wheels"))) as built:
        built.extractall(site)


def environment(folder: Path) -> Path:
    """A fresh virtual environment, and the interpreter in it.

    It sees what this one has, regkit and torch among it, so that nothing is downloaded; by itself it has pip alone.
    """
    run(sys.executable, "-m", "venv", folder, cwd=folder.parent)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    # Python 3.11 and older put an old setuptools there, which would hide the one that torch requires.
    run(python, "-m", "pip", "uninstall", "-q", "-y", "setuptools", cwd=folder)
    ours, own = sysconfig.get_path("purelib"), "import sysconfig; print(sysconfig.get_path('purelib'))"
    # A line of code rather than a path: it reads the path files in there too, and so finds an editable regkit.
    line = f"import site; site.addsitedir({ours!r})\n"
    (Path(run(python, "-c", own, cwd=folder).strip()) / "borrowed.pth").write_text(line)
    return python


def install(python: Path, *arguments: Path | str) -> None:
    """What a user does, without the index: what is required must be there."""
    pytest.importorskip("hatchling")
    flags = ("--quiet", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    run(python, "-m", "pip", "install", *flags, *arguments, cwd=python.parent)


def passed_in(python: Path | str, *sources: Path, cwd: Path, **environment: str) -> int:
    """How many of the distributions' own tests pass; one that does not is the test's failure."""
    told = run(
        python,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--import-mode=importlib",
        *sources,
        cwd=cwd,
        **environment,
    )
    (line,) = (line for line in told.splitlines() if " passed" in line)
    assert "failed" not in line
    return int(line.split(" passed")[0].split()[-1])
