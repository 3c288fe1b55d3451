"""`python -m regkit` is `regkit`."""

import sys

from regkit.cli import main

sys.exit(main())
