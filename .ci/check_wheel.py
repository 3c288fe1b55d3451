"""Check an installed wheel: what is in it, its entry points, and that it works where there is nothing else."""

import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

import torch

import regkit

wheel, pyproject = Path(sys.argv[1]), Path(sys.argv[2])
names = zipfile.ZipFile(wheel).namelist()
tops = {name.split("/")[0] for name in names}
assert {top for top in tops if not top.endswith(".dist-info")} == {"regkit", "regkit_standard"}, tops
assert {"regkit/py.typed", "regkit_standard/py.typed"} <= set(names)

assert metadata.version("torch-regkit") == regkit.__version__
points = {point.name: point.value for point in metadata.entry_points(group="regkit")}
section = pyproject.read_text(encoding="utf-8").partition("[project.entry-points.regkit]\n")[2].partition("\n\n")[0]
expected = dict(line.replace('"', "").split(" = ") for line in section.splitlines())
assert points == expected, points
rooms = {Path(name).stem for name in names if name.startswith("regkit_standard/") and name.endswith(".py")}
assert {value.rpartition(".")[2] for value in points.values()} == rooms - {"__init__", "foreach"}, rooms

assert "site-packages" in str(regkit.__file__), regkit.__file__
model = torch.nn.LSTM(3, 4)
regkit.attach(model, {"rules": [{"penalty": "l2(1)"}, {"constraint": "max_norm(1)"}]})
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model(torch.zeros(2, 1, 3))[0].sum().backward()
optimizer.step()


def command(*arguments: str) -> str:
    """What the installed command prints; it must be content."""
    script = Path(sys.executable).with_name("regkit")
    return subprocess.run([script, *arguments], stdout=subprocess.PIPE, text=True, check=True).stdout


kinds = command("kinds")
assert "max_norm" in kinds
assert "no problems found" in command("doctor")
with tempfile.TemporaryDirectory() as folder:
    assert "pyproject.toml" in command("new", "regkit-mine", "--folder", folder)  # from the templates in the wheel
print(f"{wheel.name}: {len(names)} files, {len(points)} plugins, {len(kinds.splitlines()) // 2} kinds")
