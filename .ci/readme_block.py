"""Print the N-th fenced bash block of README.md: what README tells its readers to run is what is run."""

import re
import sys
from pathlib import Path

readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
blocks = re.findall(r"^```bash\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
print(blocks[int(sys.argv[1]) - 1], end="")
