"""What every part of the suite shares."""

from __future__ import annotations

import hypothesis

# Two cores that other work shares: a deadline per example would measure the machine, not the code.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.load_profile("default")
