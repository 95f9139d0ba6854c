"""What a stream may do next, as a table.  Pure.

Two rules: an event that a state does not list is illegal and changes nothing; a state that lists
no event is final.  Whether our SYN was answered is kept apart from this: data may flow before.
"""

from __future__ import annotations

import enum
from types import MappingProxyType
from typing import Final


class State(enum.Enum):
    """Which directions of a stream still carry bytes."""

    OPEN = "open"
    WE_ENDED = "we said FIN; the peer may still send"
    THEY_ENDED = "the peer said FIN; we may still send"
    ENDED = "both said FIN"
    RESET = "we said RST"
    WAS_RESET = "the peer said RST"
    LOST = "the connection is gone"


class Change(enum.Enum):
    """What happens to a stream."""

    WE_END = "we say FIN"
    THEY_END = "the peer says FIN"
    WE_RESET = "we say RST"
    THEY_RESET = "the peer says RST"
    LOSE = "the connection is gone"


TRANSITIONS: Final = MappingProxyType(
    {
        State.OPEN: {
            Change.WE_END: State.WE_ENDED,
            Change.THEY_END: State.THEY_ENDED,
            Change.WE_RESET: State.RESET,
            Change.THEY_RESET: State.WAS_RESET,
            Change.LOSE: State.LOST,
        },
        State.WE_ENDED: {
            Change.THEY_END: State.ENDED,
            Change.WE_RESET: State.RESET,
            Change.THEY_RESET: State.WAS_RESET,
            Change.LOSE: State.LOST,
        },
        State.THEY_ENDED: {
            Change.WE_END: State.ENDED,
            Change.WE_RESET: State.RESET,
            Change.THEY_RESET: State.WAS_RESET,
            Change.LOSE: State.LOST,
        },
        State.ENDED: {},
        State.RESET: {},
        State.WAS_RESET: {},
        State.LOST: {},
    }
)

FINAL: Final = frozenset(state for state, changes in TRANSITIONS.items() if not changes)
"""Streams in these are forgotten by their connection."""


def after(state: State, change: Change) -> State | None:
    """Where a stream is after this change; None if it is illegal there."""
    return TRANSITIONS[state].get(change)
