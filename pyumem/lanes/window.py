# SPDX-License-Identifier: GPL-2.0-or-later
"""How much the background lanes have on their way: enough to keep the link busy, and little that a
requested page finds ahead of it there.

A requested page has a connection of its own, and the same link: it waits for what the background
has put into the queue in front of the narrowest place.  How long that is, TCP measures: by how much
a round trip takes longer than the shortest did.  The window is set so that this is some
milliseconds, on a slow link as on a fast one, near or far:

    window = window * (shortest + wanted queue) / round trip

Where the queue is our own the round trip is window / rate, and that is right at once; where there
is none the window grows.  The principle is that of LEDBAT (RFC 6817), and so is to take the
shortest of some round trips for what the queue is: a processor that is busy now and then makes some
of them longer, a queue all of them.

Where the queue is somebody else's a smaller window makes it no shorter, and us slower: then the
window goes back to what it was, for a while.

Where the lane is late now and then, since a processor is short, a window of a few milliseconds runs
empty meanwhile, and the link with it.  The lane sees that when it comes back and nothing is on its
way any more; the queue may be some times as long then.

A lane that does not use the window, since a processor or a limit of the rate holds it back, says
little about it: it is not why the lane got slower, and it grows no further than runs do, with which
it grows (RFC 7661).

All lanes of a migration have one window, in the claim map, or each would take the others' queue for
somebody else's.  The last of them sets it, by its own round trips and the speed of all.

It is kept by looking at what the peers have not acknowledged, before the next run is claimed.  A
send buffer of that size was tried: one that is made smaller on the way does not keep it.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pyumem.claims import ClaimMap

FIRST: Final = 256 * 1024
LEAST: Final = 64 * 1024
MOST: Final = 4 * 1024 * 1024
"""Bytes."""
_QUEUE_S: Final = 0.003
_QUEUE_SHARE: Final = 1 / 8
"""What a requested page may find ahead of it: so long, or so much of the shortest round trip."""
_SAMPLE_S: Final = 0.01
_PERIOD_S: Final = 0.2
_SHORT_PERIOD_S: Final = 0.05
"""As long as it grows."""
_PERIOD_RTTS: Final = 4
"""A period is so long, or so many of the shortest round trips if that is longer."""
_MOST_CHANGE: Final = 2.0
_LEAST_CHANGE: Final = 1.05
_GROWTH: Final = 0.5
_LEAST_BURST: Final = 32 * 1024
_FREE: Final = 0.8
"""Share of the speed that has to be left when the window got smaller."""
_LATE: Final = 0.15
"""Share of the runs that may find nothing on its way: more, and the link is idle in between."""
_LATE_QUEUES: Final = 5
"""How many times as long the queue may be then."""
_LATE_GROWTH: Final = 1.25
_USED: Final = 0.25
"""Share of the looks at which there has to be no room for the window to be what holds a lane back.
"""
_UNUSED: Final = 1024 * 1024
"""Bytes up to which it grows without being used where there is no queue, and the runs with it."""
_WAITS: Final = 1 / 16
"""Share of the runs that have to wait for room for a larger window to be of use."""
_LEAST_PATIENCE_S: Final = 0.0001
_MOST_PATIENCE_S: Final = 0.001
_HOLD_S: Final = 5.0
"""For how long it stays as it is when that was not so."""
_INFO: Final = struct.Struct("=68xI48xQ20xI")
"""struct tcp_info (linux/tcp.h): tcpi_rtt, in microseconds, tcpi_bytes_acked and tcpi_min_rtt."""


def _wanted_queue_s(min_rtt_s: float) -> float:
    return max(_QUEUE_S, _QUEUE_SHARE * min_rtt_s)


class Window:
    """Of all background lanes, as one of them sees it.  Its connection was tune()d for them."""

    def __init__(
        self,
        sock: socket.socket,
        untaken: Callable[[], int],
        claims: ClaimMap,
        lane: int = 0,
        lanes: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Watch a socket that stays the caller's; one that is not TCP's has no window.  untaken()
        tells how many bytes the peer has not acknowledged; lane counts from 0.
        """
        self._sock = sock
        self._untaken = untaken
        self._claims = claims
        self._lane = lane
        self._lanes = lanes
        self._clock = clock
        self._tcp = sock.family in (socket.AF_INET, socket.AF_INET6)
        self._judges = lane == lanes - 1
        self._acked = 0
        self._next = 0.0
        self._full = False
        self._period: _Period | None = None
        self._period_s = _SHORT_PERIOD_S
        self._before = (0, 0.0)
        """Size and speed before it got smaller; size 0 if it did not."""
        self._speed = 0.0
        self._hold_until = 0.0
        self._burst = FIRST // 4
        """Longest run as long as the window is what holds the lane back, in bytes; 0 if it is not:
        the speed says nothing of the link then, and short runs would hold it back all the more.
        """

    @property
    def size(self) -> int:
        """Return how many bytes all lanes together may have on their way."""
        return self._claims.window or FIRST

    @property
    def longest_run(self) -> int:
        """Return how many bytes should go at a time: a burst is a queue, too, for as long as the
        link takes for it.
        """
        return min(self.size // 4, self._burst or MOST) // self._lanes

    @property
    def patience_s(self) -> float:
        """Return how long to wait before asking for room again, in seconds: a part of the window
        is gone by then.
        """
        if not self._speed:
            return _MOST_PATIENCE_S
        return min(_MOST_PATIENCE_S, max(_LEAST_PATIENCE_S, self.size / 8 / self._speed))

    def room(self, nr_bytes: int) -> bool:
        """Tell whether so many bytes may go now."""
        if not self._tcp:
            return True
        on_way = self._untaken()
        self._claims.tell(self._lane, on_way, self._acked)
        all_on_way = self._claims.told()[0]
        more = all_on_way > self.size // 2 and all_on_way + nr_bytes > self.size
        # One that has nothing on its way may go: the others' word may be old.
        full = more and bool(on_way)
        if self._period:
            self._period.waits += full and not self._full
            self._period.runs += not full
            self._period.empty += not all_on_way
        self._full = full
        return not full

    def leave(self) -> None:
        """Tell the others that this lane sends no more."""
        self._claims.tell(self._lane, 0, self._acked)

    def look(self) -> None:
        """Take a sample, if it is time for one, and judge at the end of a period."""
        now = self._clock()
        if not self._tcp or now < self._next:
            return
        self._next = now + _SAMPLE_S
        raw = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size)
        if len(raw) < _INFO.size:
            self._tcp = False
            return
        rtt_us, self._acked, min_rtt_us = _INFO.unpack(raw)
        self._claims.tell(self._lane, self._untaken(), self._acked)
        acked = self._claims.told()[1]
        period = self._period
        if period is None:
            # Before its first measurement the kernel's shortest one is the largest number there is.
            near_us = min(rtt_us, min_rtt_us)
            length_s = max(self._period_s, _PERIOD_RTTS * near_us / 1e6)
            period = self._period = _Period(now, now + length_s, acked, rtt_us)
        period.shortest_us = min(period.shortest_us, rtt_us)
        period.looks += 1
        period.full += self._full
        if now >= period.ends:
            speed = (acked - period.acked) / (now - period.began)
            before = self.size
            self._speed = speed
            used = period.full >= _USED * period.looks
            late = used and period.empty > _LATE * period.runs
            waits = used or period.waits > _WAITS * period.runs
            rtt_s, min_rtt_s = period.shortest_us / 1e6, min_rtt_us / 1e6
            wanted_s = _wanted_queue_s(min_rtt_s)
            # Each lane's own affair, by the speed of all; the window is one lane's.
            self._burst = max(_LEAST_BURST, int(speed * wanted_s)) if used else 0
            if self._judges:
                self._judge(now, rtt_s, min_rtt_s, speed, waits=waits, used=used, late=late)
            self._period = None
            self._period_s = _SHORT_PERIOD_S if self.size > before else _PERIOD_S
            if self.size < before:
                # What is measured lags behind: it is smoothed, and the queue has to drain.
                self._next = now + (period.ends - period.began) / 2

    def _judge(
        self,
        now: float,
        rtt_s: float,
        min_rtt_s: float,
        speed: float,
        *,
        waits: bool,
        used: bool,
        late: bool,
    ) -> None:
        """Set what is right by these.  waits: the window kept the lane from sending now and then;
        used: most of the time; late: but the link was idle, too.
        """
        size_before, speed_before = self._before
        self._before = (0, 0.0)
        if used and size_before and speed < _FREE * speed_before:
            self._hold_until, self._claims.window = now + _HOLD_S, size_before
            return
        wanted_s = _wanted_queue_s(min_rtt_s)
        change = (min_rtt_s + wanted_s) / max(rtt_s, min_rtt_s, 1e-6)
        if late:
            most = speed * (min_rtt_s + _LATE_QUEUES * wanted_s) / self.size
            change = max(change, min(_LATE_GROWTH, most))
        # Far away the shortest round trip is nearly all of it: grow by how short the queue is.
        change = max(change, 1 + _GROWTH * (1 - (rtt_s - min_rtt_s) / wanted_s))
        change = min(_MOST_CHANGE, max(1 / _MOST_CHANGE, change))
        size = min(MOST * self._lanes, max(LEAST, int(self.size * change) & ~0xFFF))
        if 1 / _LEAST_CHANGE < size / self.size < _LEAST_CHANGE:
            return
        if size > max(self.size, _UNUSED * self._lanes) and not waits:
            return
        if size < self.size:
            if now < self._hold_until:
                return
            self._before = (self.size, speed)
        self._claims.window = size


@dataclass(slots=True)
class _Period:
    began: float
    ends: float
    acked: int
    """What the peer had acknowledged when it began, in bytes."""
    shortest_us: int
    """Round trip in it, smoothed by the kernel."""
    looks: int = 0
    full: int = 0
    """Looks at which there was no room."""
    runs: int = 0
    waits: int = 0
    """Runs that had to wait for room."""
    empty: int = 0
    """Runs that found nothing on its way."""
