"""What the tests of the gateway share."""

from __future__ import annotations

import sys
from pathlib import Path

# import-mode=importlib keeps test folders off the path; some doubles are too long for a conftest.
sys.path.insert(0, str(Path(__file__).parent))
# The PostgreSQL server for tests lives with the coordinator's.
sys.path.append(str(Path(__file__).parent.parent / "coordinator"))
