"""Noticing that a peer is silent: one task for all connections.

A connection on which anything was heard lately needs no ping.  So of two ends only one pings: the
one that dialled, since its patience is shorter.  To the other, which may have a thousand peers, the
ping is a sign of life.
"""

from __future__ import annotations

import itertools
from typing import Final, Protocol

import trio

_GOLDEN: Final = 0.6180339887
"""Multiples of it spread evenly over an interval, however many there are."""
_LOOKS_PER_INTERVAL: Final = 4
_MEASURE_EVERY: Final = 30.0
"""Seconds after which the round trip is measured anew, though much is heard."""


class Patient(Protocol):
    """A connection whose pulse is felt."""

    heard_at: float
    measured_at: float

    def ping(self) -> None:
        """Ask for a sign of life."""
        ...

    def give_up(self, reason: str) -> None:
        """Close: the peer is gone."""
        ...


class Pulse:
    """Owned by one host; times are seconds of trio's clock."""

    def __init__(self, *, ping_interval: float, dead_after: float) -> None:
        self._interval = ping_interval
        self._dead_after = dead_after
        self._patience: dict[Patient, float] = {}
        self._numbers = itertools.count()

    def watch(self, patient: Patient, *, first: bool) -> None:
        """Ping this one when it is silent, and give it up when it stays so.

        `first` says that we are the ones to ping; else we do so only if the peer does not.
        """
        spread = 0.25 * (next(self._numbers) * _GOLDEN % 1.0)
        self._patience[patient] = self._interval * ((0.75 if first else 1.25) + spread)

    def unwatch(self, patient: Patient) -> None:
        """The opposite of `watch`; harmless when repeated."""
        self._patience.pop(patient, None)

    async def run(self) -> None:
        """Look at everybody, again and again, until cancelled."""
        pause = self._interval / _LOOKS_PER_INTERVAL
        while True:
            due = trio.current_time() + pause
            await trio.sleep_until(due)
            late = trio.current_time() - due
            await trio.lowlevel.checkpoint()  # what waits in the sockets is read first
            now = trio.current_time()
            if late > pause:
                self._excuse(late, now=now)
            for patient, patience in list(self._patience.items()):
                silent = now - patient.heard_at
                if silent >= self._dead_after:
                    self.unwatch(patient)
                    patient.give_up(f"nothing was heard of it for {silent:.1f} s")
                elif silent >= patience or now - patient.measured_at >= _MEASURE_EVERY:
                    patient.ping()

    def _excuse(self, late: float, *, now: float) -> None:
        """Hold nobody's silence against it while it was us who were away.

        A step that holds up the event loop, or a process that was stopped and goes on, would else
        lose every peer at once.
        """
        for patient in self._patience:
            patient.heard_at = min(now, patient.heard_at + late)
