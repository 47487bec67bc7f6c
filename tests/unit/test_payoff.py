# SPDX-License-Identifier: GPL-2.0-or-later
"""Compression goes on while it pays: a lane with clocks of its own, over links of all kinds."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest

from pyumem.lanes.payoff import Payoff, busy_s

RUN = 64 * 1024
MB = 1e6


@dataclass
class Lane:
    """A lane, in seconds and bytes of its own.  Its socket's buffer hides the work behind the link,
    so that a run takes what is longer.
    """

    link: float
    """Bytes a second."""
    share: float = 0.5
    """What compression leaves of a run."""
    packing: float = 200 * MB
    copying: float = 2000 * MB
    unpacking: float = 700 * MB
    """What the destination makes of compressed pages, bytes of RAM a second."""

    def __post_init__(self) -> None:
        self.time = self.cpu = 0.0
        self.sent = self.compressed = 0
        self.payoff = Payoff(lambda: self.time, lambda: self.cpu)

    def run(self) -> None:
        packs = self.payoff.wants()
        work = RUN / self.copying
        wire = RUN * 1.0
        if packs:
            work += RUN / self.packing
            wire *= self.share
            self.payoff.packed(RUN, int(wire), RUN / self.packing)
            self.compressed += RUN
        self.cpu += work
        self.time += max(work, wire / self.link, RUN / self.unpacking if packs else 0)
        self.sent += RUN
        self.payoff.sent(RUN)

    def go(self, seconds: float) -> float:
        """Go on for so long; return bytes of RAM a second."""
        began, before = self.time, self.sent
        while self.time - began < seconds:
            self.run()
        return (self.sent - before) / (self.time - began)


def test_a_slow_link_is_compressed_for() -> None:
    lane = Lane(link=12.5 * MB)
    assert lane.go(60) == pytest.approx(25 * MB, rel=0.1)
    assert lane.payoff.packing


def test_it_begins_soon() -> None:
    lane = Lane(link=12.5 * MB)
    while not lane.payoff.packing:
        lane.run()
    assert lane.time < 0.5 and lane.sent < 8 * MB


def test_a_link_faster_than_the_sender_is_left_alone() -> None:
    lane = Lane(link=5000 * MB)
    assert lane.go(20) == pytest.approx(2000 * MB)
    assert lane.compressed == 0, "nothing was even tried"


@pytest.mark.parametrize("link", [200, 400, 800, 1200, 1900])
def test_a_link_faster_than_compression_costs_nothing(link: int) -> None:
    lane = Lane(link=link * MB)
    assert lane.go(20) > 0.98 * link * MB
    assert lane.compressed < 0.02 * lane.sent and not lane.payoff.packing


def test_what_does_not_shrink_is_left_alone() -> None:
    lane = Lane(link=50 * MB, share=0.95)
    assert lane.go(60) > 0.98 * 50 * MB
    assert lane.compressed < 0.03 * lane.sent and not lane.payoff.packing


def test_a_slow_destination_is_noticed() -> None:
    lane = Lane(link=100 * MB, share=0.3, unpacking=60 * MB)
    assert lane.go(60) > 0.95 * 100 * MB
    assert not lane.payoff.packing


def test_it_follows_what_the_memory_holds() -> None:
    lane = Lane(link=20 * MB)
    lane.go(20)
    assert lane.payoff.packing
    lane.share = 0.99
    assert lane.go(60) > 0.98 * 20 * MB
    assert not lane.payoff.packing
    lane.share = 0.3
    lane.go(60)
    assert lane.payoff.packing


def test_it_follows_the_link() -> None:
    lane = Lane(link=20 * MB)
    lane.go(20)
    assert lane.payoff.packing
    lane.link = 1000 * MB
    lane.go(10)
    assert not lane.payoff.packing
    assert lane.go(20) > 0.95 * 1000 * MB
    lane.link = 10 * MB
    lane.go(60)
    assert lane.payoff.packing
    lane.link = 5 * MB  # slower than plain was when that was measured
    assert lane.go(120) > 0.9 * 10 * MB


def test_a_connection_that_had_just_begun_is_no_slow_link() -> None:
    lane = Lane(link=8 * MB, share=0.3, packing=20 * MB)
    while not lane.payoff.packing:
        lane.run()
    lane.link = 1000 * MB
    lane.go(0.2)
    assert not lane.payoff.packing
    lane.go(1)
    assert lane.go(10) > 0.95 * 1000 * MB


def test_a_pause_is_no_slow_link() -> None:
    lane = Lane(link=5000 * MB)
    for _ in range(200):
        lane.go(0.03)
        lane.time += 1  # paused by the operator
        lane.payoff.restart()
    lane.go(1)
    assert lane.compressed == 0


def test_waiting_for_a_processor_is_being_busy() -> None:
    """Two threads of two processes on one processor: each runs half of the time."""
    (first, *_) = os.sched_getaffinity(0)
    spin = "import time\nend = time.monotonic() + 20\nwhile time.monotonic() < end: pass"
    with subprocess.Popen([sys.executable, "-c", spin]) as other:
        before = os.sched_getaffinity(0)
        try:
            for pid in (0, other.pid):
                os.sched_setaffinity(pid, {first})
            began, busy, cpu = time.monotonic(), busy_s(), time.thread_time()
            while time.thread_time() - cpu < 0.2:
                pass
            passed = time.monotonic() - began
            assert busy_s() - busy > 0.9 * passed > 1.2 * 0.2
        finally:
            os.sched_setaffinity(0, before)
            other.kill()
