# SPDX-License-Identifier: GPL-2.0-or-later
"""When pre-copy is to stop: pure, from the figures of its rounds.

A round sends what the guest wrote during the one before.  What remains at its end is what it wrote
meanwhile.  That fits when it can be sent within the downtime that was asked for.  It converges
while the least that ever remained goes on shrinking; where it does not, over some rounds, the
choice is to switch to post-copy or to give up.  The switch waits, for some rounds at most, for one
that ends near the least that was seen: what remains is what the guest will miss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from pyumem.ram import PAGE_SIZE

WINDOW: Final = 3
"""Rounds without progress after which it does not converge."""
_PROGRESS: Final = 0.9
"""The least that remained has to shrink to so much of what it was, within the window."""
_NEAR_LEAST: Final = 1.1
_DEVICE_S: Final = 0.05
"""Seconds of downtime that are not for pages: QEMU's stop and start."""


class Verdict(StrEnum):
    """What to do after a round."""

    GO_ON = "go on"
    FINISH = "finish"  # the rest fits into the downtime: stop the VM and send it
    SWITCH = "switch"  # stop the VM; the rest is post-copied
    GIVE_UP = "give up"  # the VM stays


@dataclass(frozen=True, slots=True)
class Limits:
    """What was asked for."""

    max_downtime_s: float = 0.3
    max_precopy_s: float | None = None
    """None: as long as it makes progress."""
    rounds: int | None = None
    """Switch after so many, whatever they brought; None: as many as pay."""
    may_switch: bool = False
    """By itself; otherwise it gives up."""


@dataclass(frozen=True, slots=True)
class Round:
    """One round, at its end."""

    sent_pages: int
    """Zero pages among them."""
    sent_bytes: int
    """On the wire."""
    seconds: float
    remaining_pages: int


@dataclass(frozen=True, slots=True)
class Decision:
    """A verdict, and why, with the numbers behind it."""

    verdict: Verdict
    reason: str
    downtime_s: float
    """Predicted, should it stop now and send what remains."""


def _per_s(count: float, rounds: Sequence[Round]) -> float:
    seconds = sum(one.seconds for one in rounds)
    return count / seconds if seconds > 0 else 0.0


class Convergence:
    """Judges rounds, one after the other."""

    def __init__(self, limits: Limits) -> None:
        """Begin with none."""
        self._limits = limits
        self._rounds: list[Round] = []
        self._stuck = 0
        """Rounds since it was found not to converge."""

    @property
    def nr_rounds(self) -> int:
        """Return how many there were."""
        return len(self._rounds)

    @property
    def pages_per_s(self) -> float:
        """Return how fast pages go that the guest has written, by the last rounds; 0 if unknown.

        The first round says that by its bytes alone: in it are the holes of all memory, which cost
        nothing, and what remains was written a moment ago.  Later ones sent what the guest had
        written, as zero or not as what remains.
        """
        first, later = self._rounds[:1], self._rounds[1:][-WINDOW:]
        if pages := sum(one.sent_pages for one in later):
            return _per_s(pages, later)
        content = sum(one.sent_bytes for one in first) / PAGE_SIZE
        return _per_s(content or sum(one.sent_pages for one in first), first)

    def downtime_s(self, pages: int) -> float:
        """Predict the downtime if so many pages are to be sent in it."""
        if not pages:
            return _DEVICE_S
        speed = self.pages_per_s
        return _DEVICE_S + pages / speed if speed else float("inf")

    def judge(self, now: Round, elapsed_s: float) -> Decision:
        """Judge a round that is over; elapsed_s is since the first began."""
        self._rounds.append(now)
        limits, remaining = self._limits, now.remaining_pages
        downtime = self.downtime_s(remaining)
        told = (
            f"{remaining * PAGE_SIZE >> 10} KiB remain after round {self.nr_rounds}, "
            f"{downtime * 1000:.0f} ms at {self.pages_per_s * PAGE_SIZE / 1e6:.1f} MB/s"
        )
        if limits.rounds is not None and self.nr_rounds >= limits.rounds:
            return Decision(Verdict.SWITCH, f"{told}: these were all rounds", downtime)
        # A limit that leaves little beside the stop and the start is about pages all the same.
        most = max(limits.max_downtime_s - _DEVICE_S, limits.max_downtime_s / 4)
        if limits.rounds is None and downtime - _DEVICE_S <= most:
            why = f"{told}: within {limits.max_downtime_s * 1000:.0f} ms"
            return Decision(Verdict.FINISH, why, downtime)
        leave = Verdict.SWITCH if limits.may_switch else Verdict.GIVE_UP
        if limits.max_precopy_s is not None and elapsed_s >= limits.max_precopy_s:
            why = f"{told}: {limits.max_precopy_s:g} s of pre-copy are over"
            return Decision(leave, why, downtime)
        if limits.rounds is None and not self._progresses():
            self._stuck += 1
            if self._near_least(remaining) or self._stuck > WINDOW:
                why = f"{told}: no less than {self._least()} KiB in {WINDOW} rounds"
                return Decision(leave, why, downtime)
        else:
            self._stuck = 0
        return Decision(Verdict.GO_ON, told, downtime)

    def _least(self) -> int:
        return min(one.remaining_pages for one in self._rounds) * PAGE_SIZE >> 10

    def _near_least(self, remaining: int) -> bool:
        return remaining <= _NEAR_LEAST * min(one.remaining_pages for one in self._rounds)

    def _progresses(self) -> bool:
        if len(self._rounds) <= WINDOW:
            return True
        before = min(one.remaining_pages for one in self._rounds[:-WINDOW])
        since = min(one.remaining_pages for one in self._rounds[-WINDOW:])
        return since <= _PROGRESS * before
