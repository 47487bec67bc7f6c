# SPDX-License-Identifier: GPL-2.0-or-later
"""A background lane's window, over links of all kinds that exist as arithmetic only."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from pyumem.claims import ClaimMap, Slots
from pyumem.lanes import window
from pyumem.lanes.window import FIRST, LEAST, MOST, Window
from tests.unit.test_lanes import tcp_pair

_QUEUE_S = 0.003


class Line:
    """A link that its lanes keep full: what is on its way beyond the link's own is a queue."""

    family = socket.AF_INET

    def __init__(
        self,
        rate: float,
        rtt_s: float,
        busy_s: float = 0.0,
        others_s: float = 0.0,
        lanes: int = 1,
        most_s: float = 1e12,
        late_s: float = 0.0,
    ) -> None:
        """most_s: bytes that the lanes have to send in a second; late_s: how long it takes a lane
        to notice that there is room.
        """
        self.late_s = late_s
        self.rate, self.rtt_s, self.busy_s, self.others_s = rate, rtt_s, busy_s, others_s
        self.most_s = most_s
        self.on_way = 0
        self.changes = 0
        self.dice = random.Random(1)
        self.now = self.acked = self.smooth_s = 0.0
        self.claims = ClaimMap.create(Slots([1]))
        self.lanes: list[Any] = [
            Window(self, lambda: self.on_way, self.claims, lane, lanes, lambda: self.now)  # type: ignore[arg-type]
            for lane in range(lanes)
        ]
        self.lane = self.lanes[-1]
        self.history: list[int] = []

    def getsockopt(self, _level: int, _what: int, size: int) -> bytes:
        info = bytearray(size)
        info[68:72] = int(1e6 * self.smooth_s).to_bytes(4, "little")
        info[120:128] = int(self.acked).to_bytes(8, "little")
        info[148:152] = int(1e6 * self.rtt_s).to_bytes(4, "little")
        return bytes(info)

    def run(self, seconds: float) -> int:
        end = self.now + seconds
        while self.now < end:
            self.now += 0.002
            rtt_s = max(self.rtt_s, self.lane.size / self.rate) + self.others_s
            speed = min(self.most_s, self.lane.size / (rtt_s + self.late_s))
            if speed == self.most_s:
                rtt_s = self.rtt_s + self.others_s
            self.acked += 0.002 * speed / len(self.lanes)
            on_way = speed * rtt_s if speed == self.most_s else self.lane.size
            self.on_way = int(on_way / len(self.lanes))
            if self.dice.random() < self.late_s / (rtt_s + self.late_s):
                self.on_way = 0
            rtt_s += self.dice.choice((0, 0, 0, self.busy_s))
            self.smooth_s = 7 / 8 * (self.smooth_s or rtt_s) + rtt_s / 8
            for lane in self.lanes:
                lane.room(4096)
                lane.look()
            self.changes += bool(self.history) and self.history[-1] != self.lane.size
            self.history.append(self.lane.size)
        return int(self.lane.size)


@pytest.mark.parametrize("busy_s", [0.0, 0.03])
@pytest.mark.parametrize(
    ("rate", "rtt_s"),
    [
        pytest.param(100e6 / 8, 0.004, id="100 Mbit/s"),
        pytest.param(1e9 / 8, 0.0004, id="1 Gbit/s"),
        pytest.param(1e9 / 8, 0.02, id="1 Gbit/s, far"),
        pytest.param(10e9 / 8, 0.0002, id="10 Gbit/s"),
        pytest.param(50e6 / 8, 0.05, id="50 Mbit/s, far"),
    ],
)
def test_the_link_is_busy_and_its_queue_short(rate: float, rtt_s: float, busy_s: float) -> None:
    size = Line(rate, rtt_s, busy_s).run(10)
    assert size >= min(MOST, 0.85 * rate * rtt_s), "the link is not idle"
    assert size / rate <= 1.3 * (rtt_s + max(_QUEUE_S, rtt_s / 8))


@pytest.mark.parametrize("lanes", [2, 5])
def test_lanes_together_do_what_one_does(lanes: int) -> None:
    rate, rtt_s = 100e6 / 8, 0.004
    line = Line(rate, rtt_s, lanes=lanes)
    size = line.run(10)
    assert 0.85 * rate * rtt_s <= size <= 1.3 * rate * (rtt_s + _QUEUE_S)
    assert len({(lane.longest_run, lane.patience_s) for lane in line.lanes}) == 1


def test_a_lane_that_does_not_use_its_window_leaves_it() -> None:
    """It is as slow as its processor lets it be, now and then more so: no reason for a larger
    window, which would be a queue as soon as it is faster.
    """
    line = Line(100e6 / 8, 0.004, most_s=3e6)
    for speed in (3e6, 1e6) * 10:
        line.most_s = speed
        line.run(0.25)
    assert line.lane.size <= window._UNUSED
    assert line.lane.longest_run == line.lane.size // 4, "short runs would hold it back more"
    line.most_s = 1e12
    assert line.run(3) <= 1.3 * line.rate * (line.rtt_s + _QUEUE_S)
    assert line.lane.longest_run <= 1.1 * line.rate * _QUEUE_S


def test_a_lane_that_is_late_keeps_the_link_busy() -> None:
    line = Line(100e6 / 8, 0.004, late_s=0.006)
    line.run(5)
    before = line.acked
    line.run(10)
    assert line.acked - before > 0.65 * 10 * line.rate, "by the round trips alone it is 0.47"
    assert max(line.history[-5000:]) <= line.rate * (line.rtt_s + 5.2 * _QUEUE_S)


def test_bounds() -> None:
    assert Line(1e6 / 8, 0.001).run(10) == LEAST
    assert Line(1e12, 0.001).run(10) == MOST


def test_a_queue_of_others_takes_nothing_from_us() -> None:
    """But for a moment now and then, in which it is tried."""
    line = Line(1e9 / 8, 0.001, others_s=0.1)
    line.run(60)
    assert sum(line.history) / len(line.history) > 0.9 * FIRST
    line.others_s = 0.0
    assert line.run(6) > 1.2 * FIRST


def test_a_round_trip_that_is_not_measured_yet() -> None:
    """Of a connection whose first packet was lost, say: the kernel tells ~0 for the shortest."""
    line = Line(100e6 / 8, 0.004)
    line.rtt_s, known_s = 0xFFFFFFFF / 1e6, line.rtt_s
    line.smooth_s = 0.0
    line.lane.look()
    line.rtt_s = known_s
    assert line.run(10) < 0.6 * FIRST


def test_what_does_not_change_is_not_set_again() -> None:
    line = Line(100e6 / 8, 0.004)
    line.run(60)
    assert line.changes < 10


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = tcp_pair()
    with one, other:
        yield one, other


def test_the_kernel_has_what_is_read(pair: tuple[socket.socket, socket.socket]) -> None:
    """The places in struct tcp_info, on loopback: a round trip takes some microseconds."""
    one, other = pair
    for _ in range(20):
        one.sendall(b"x" * 1000)
        other.recv(1000)
    info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    rtt, acked, shortest = window._INFO.unpack_from(info)
    assert 0 < shortest <= rtt < 1_000_000 and acked == 20 * 1000 + 1
    now = 0.0
    lane = Window(one, lambda: MOST, ClaimMap.create(Slots([1])), clock=lambda: now)
    for _ in range(100):
        assert not lane.room(lane.size)
        lane.look()
        now += 0.01
    assert lane.size > FIRST


def test_room() -> None:
    line = Line(1e9 / 8, 0.001)
    assert line.lane.room(MOST), "a run may be larger than the window, alone"
    line.on_way = FIRST // 2
    assert line.lane.room(MOST), "two of them keep the link busy"
    line.on_way = FIRST // 2 + 4096
    assert line.lane.room(FIRST // 2 - 4096) and not line.lane.room(FIRST // 2)
    assert line.lane.longest_run == FIRST // 4


def test_lanes_share_their_room() -> None:
    line = Line(1e9 / 8, 0.001, lanes=2)
    one, other = line.lanes
    line.on_way = FIRST // 2
    assert one.room(FIRST // 2) and not other.room(1)
    one.leave()
    assert other.room(1)
    assert other.longest_run == FIRST // 8


def test_a_socket_of_another_family_is_left_alone() -> None:
    one, other = socket.socketpair()
    with one, other:
        lane = Window(one, lambda: 2 * MOST, ClaimMap.create(Slots([1])))
        lane.look()
        assert lane.size == FIRST and lane.room(MOST)
