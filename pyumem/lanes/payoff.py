# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether to compress the next run: while it pays, by what this lane measures of itself.

It pays where a lane waits for its link, and compressing is faster than waiting.  All is judged in
windows of some runs, by the seconds that a byte of RAM takes:

    plain    measured.  The lane waits if its thread has run, or wanted to, for much less time than
             has passed; if it does not, nothing is tried.  If it does, some runs of the next
             window go compressed, as samples of what that costs and achieves.  What is then
             expected,
                 the longer of  busy time + compression  and  share that is left * time,
             has to be clearly less than the time
    packed   measured too: it goes on as long as it is faster than plain was.  Where the link is the
             bottleneck no more, it may have got faster, and plain is measured again: soon at first,
             since what it was compared with may be a connection that had just begun, and then ever
             less often

Each failure doubles the number of windows until the next attempt.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

_SCHEDSTAT: Final = Path("/proc/thread-self/schedstat")
"""Nanoseconds on a processor, and waiting for one: Documentation/scheduler/sched-stats.rst."""
_RUNS: Final = 16
"""Runs in a window, at least ..."""
_SECONDS: Final = 0.05
"""... and its length, at least: more than what a socket's buffer takes at once."""
_SAMPLES: Final = 4
_SAMPLE_EVERY: Final = _RUNS // _SAMPLES
_IDLE: Final = 0.25
"""Share of the time that a lane waits for its link, from which on the link is the bottleneck."""
_GAIN: Final = 0.8
"""What compression has to make of the time to be begun; of it measured later, see _STAY."""
_STAY: Final = 0.95
_FIRST_WAIT: Final = 2
_LONGEST_WAIT: Final = 64
"""Windows between two attempts, at most."""
_FIRST_TRUST: Final = 1
_LONGEST_TRUST: Final = 16
"""Windows for which the last time of a plain one is believed while the lane does not wait: doubled
each time that it is measured again, until an attempt fails.
"""


def busy_s() -> float:
    """Return for how many seconds this thread has run, or would have if it had got a processor: on
    a busy host one that waits for a processor looks as if it waited for its link, and to compress
    would make it wait the more.
    """
    try:
        ran, delayed, _ = _SCHEDSTAT.read_bytes().split()
    except (OSError, ValueError):  # a kernel without CONFIG_SCHED_INFO
        return time.thread_time()
    return (int(ran) + int(delayed)) / 1e9


def _waits(elapsed: float, cpu: float) -> bool:
    return elapsed - cpu > _IDLE * elapsed


class Decision(Protocol):
    """What a Packer asks and tells."""

    def wants(self) -> bool:
        """Tell whether the next run is to be compressed."""

    def packed(self, before: int, after: int, seconds: float) -> None:
        """Hear how long compressing took and what came of it, in bytes."""

    def sent(self, run: int) -> None:
        """Hear that a run of so many bytes of RAM was sent."""

    def restart(self) -> None:
        """Forget the window: the lane stood still for a reason of its own."""


class Always:
    """--compress on."""

    def wants(self) -> bool:
        """Always."""
        return True

    def packed(self, before: int, after: int, seconds: float) -> None:
        """Does not matter."""

    def sent(self, run: int) -> None:
        """Does not matter."""

    def restart(self) -> None:
        """Does not matter."""


@dataclass(slots=True)
class _Window:
    began: float
    cpu_began: float
    runs: int = 0
    bytes: int = 0
    tried: int = 0
    """Of bytes: how many were compressed,"""
    left: int = 0
    """what was left of them,"""
    packing_s: float = 0.0
    """and how long that took."""


class Payoff:
    """--compress auto."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        cpu: Callable[[], float] = busy_s,
    ) -> None:
        """Begin plain.  clock and cpu give seconds: of time, and of this thread's being busy."""
        self._clock = clock
        self._cpu = cpu
        self.packing = False
        """Whether it pays, as far as is known."""
        self._sampling = False
        # The first window says little: it fills the socket's buffer.
        self._wait = 1
        self._next_wait = _FIRST_WAIT
        self._plain_s = self._plain_cpu_s = 0.0
        self._trust = _FIRST_TRUST
        self._age = 0
        self._window = self._begin()

    def _begin(self) -> _Window:
        return _Window(self._clock(), self._cpu())

    def wants(self) -> bool:
        """Tell whether the next run is to be compressed."""
        runs = self._window.runs
        return self.packing or (self._sampling and runs < _RUNS and not runs % _SAMPLE_EVERY)

    def packed(self, before: int, after: int, seconds: float) -> None:
        """Hear how long compressing took and what came of it, in bytes."""
        window = self._window
        window.tried += before
        window.left += after
        window.packing_s += seconds

    def sent(self, run: int) -> None:
        """Hear that a run of so many bytes of RAM was sent; judge at the end of a window."""
        window = self._window
        window.runs += 1
        window.bytes += run
        if window.runs < _RUNS:
            return
        elapsed = self._clock() - window.began
        if elapsed < _SECONDS:
            return
        cpu = self._cpu() - window.cpu_began
        if self.packing:
            self._judge_packed(window, elapsed, cpu)
        else:
            self._judge_plain(window, elapsed, cpu)
        self._window = self._begin()

    def restart(self) -> None:
        """Forget the window: the lane stood still for a reason of its own."""
        self._window = self._begin()

    def _judge_plain(self, window: _Window, elapsed: float, cpu: float) -> None:
        if self._sampling:
            self._sampling = False
            if window.tried and self._expected(window) < _GAIN * self._plain_s:
                self.packing, self._age = True, 0
            else:
                self._failed()
            return
        self._plain_s, self._plain_cpu_s = elapsed / window.bytes, cpu / window.bytes
        self._wait -= self._wait > 0
        self._sampling = _waits(elapsed, cpu) and not self._wait

    def _expected(self, window: _Window) -> float:
        """Return what a byte would take, by the samples of a window and the plain one before."""
        packing = window.packing_s / window.tried
        return max(self._plain_cpu_s + packing, self._plain_s * window.left / window.tried)

    def _judge_packed(self, window: _Window, elapsed: float, cpu: float) -> None:
        self._age += 1
        if self._age == _LONGEST_TRUST:
            self._next_wait = _FIRST_WAIT
        if elapsed / window.bytes > _STAY * self._plain_s:
            self.packing = False
            self._failed()
        elif self._age >= self._trust and not _waits(elapsed, cpu):
            self.packing = False  # the wait is 0: at once again, if nothing has changed
            self._trust = min(2 * self._trust, _LONGEST_TRUST)

    def _failed(self) -> None:
        self._trust = _FIRST_TRUST
        self._wait = self._next_wait
        self._next_wait = min(2 * self._next_wait, _LONGEST_WAIT)
