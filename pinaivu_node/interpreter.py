"""How CPython is set up in a daemon that answers in milliseconds."""

from __future__ import annotations

import gc
import sys
from typing import Final

_YOUNG_OBJECTS: Final = 20_000
"""Allocations between two collections of the youngest generation.  The stock 700 are passed several
times within one request, and nearly all that a request makes is freed by its last reference."""
_SWITCH_SECONDS: Final = 0.001
"""How long a thread at the database may keep the event loop from the interpreter; stock: 5 ms."""


def tune_for_start() -> None:
    """Call once, first: collect nothing until `tune_for_latency`.

    What a daemon imports stays; walking it again and again is a fifth of the time it takes.
    """
    gc.disable()


def tune_for_latency() -> None:
    """Call once, when everything that stays has been made.

    What was imported and built so far is never looked at by the collector again: walking it takes
    tens of milliseconds, during which nobody is answered.
    """
    gc.collect()
    gc.freeze()
    gc.enable()
    gc.set_threshold(_YOUNG_OBJECTS, 20, 20)
    sys.setswitchinterval(_SWITCH_SECONDS)
