"""Loads the files beside the tests: under importmode=importlib they are not a package."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
