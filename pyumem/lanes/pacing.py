# SPDX-License-Identifier: GPL-2.0-or-later
"""Keeping a lane within its rate.

The wait is before the claim: a page that is claimed goes at once, since the guest may ask for it.
(Pacing by TCP has it wait in the socket.)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from pyumem.claims import UNPACED, ClaimMap
from pyumem.ram import PAGE_SIZE

_PAUSED_MS: Final = 50
_BURST_S: Final = 0.1
"""What a run may take of a limited rate, in seconds: runs get shorter, down to a page."""


class Pacer:
    """Of one lane."""

    def __init__(
        self, claims: ClaimMap, stopped: Callable[[int], bool], paused: Callable[[], None]
    ) -> None:
        """The pace is that of the claim map.  stopped() lets so many milliseconds pass, and tells
        whether the lane is to end; paused() is told each time that the pace is a pause.
        """
        self._claims = claims
        self._stopped = stopped
        self._paused = paused
        self._run_bytes = 0
        self._run_at = 0.0

    def begins(self) -> None:
        """Know that a run begins now."""
        self._run_at = time.monotonic()

    def took(self, nr_bytes: int) -> None:
        """Know how many bytes it was."""
        self._run_bytes = nr_bytes

    def next_run(self, longest: int) -> int:
        """Sleep as long as the pace wants it; return how many pages may go then, 0 when the lane is
        to end.
        """
        while True:
            pace = self._claims.pace
            wait_ms = _PAUSED_MS
            if pace:
                wait_s = self._run_bytes / pace - (time.monotonic() - self._run_at)
                if wait_s <= 0 or pace == UNPACED:
                    return max(1, min(longest, int(pace * _BURST_S) // PAGE_SIZE))
                wait_ms = min(_PAUSED_MS, int(wait_s * 1000) + 1)
            else:
                self._paused()
            if self._stopped(wait_ms):
                return 0
