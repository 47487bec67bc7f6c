# SPDX-License-Identifier: GPL-2.0-or-later
"""The claim map: every page has one sender, also among processes and when one is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyumem.claims import ClaimMap, Slots, spread


@pytest.fixture
def claims() -> Iterator[ClaimMap]:
    claims = ClaimMap.create(Slots([100, 50]))
    yield claims
    claims.close()


def test_slots() -> None:
    slots = Slots([100, 50, 1])
    assert slots.total == 151
    assert [slots.slot(n, 0) for n in range(3)] == [0, 100, 150]
    assert [slots.area_of(n) for n in (0, 99, 100, 149, 150)] == [0, 0, 1, 1, 2]
    with pytest.raises(ValueError):
        slots.area_of(151)


def test_a_claim_is_given_once_and_moves_the_cursor(claims: ClaimMap) -> None:
    assert claims.claim([5, 7, 5]) == [5, 7]
    assert claims.cursor == 8
    assert claims.claim([7, 5]) == []
    assert claims.cursor == 8
    assert claims.claim([149]) == [149]
    assert claims.cursor == 0  # behind the last one is the first
    assert claims.claimed() == 3


def test_ranges(claims: ClaimMap) -> None:
    claims.claim([5, 7])
    assert claims.claim_range(4, 6) == [(4, 1), (6, 1), (8, 2)]
    assert claims.claim_range(4, 6) == []
    assert claims.claim_range(0, 150) == [(0, 4), (10, 140)]


def test_runs_follow_the_cursor_and_stay_within_an_area(claims: ClaimMap) -> None:
    assert claims.claim_runs(64) == [(0, 64)]
    claims.claim([90])
    assert claims.claim_runs(64) == [(91, 9)]
    assert claims.claim_runs(64) == [(100, 50)]
    assert claims.claim_runs(64) == [(64, 26)]
    assert claims.claim_runs(64) == []
    assert claims.claimed() == 150


def test_runs_that_lie_apart(claims: ClaimMap) -> None:
    claims.claim([*range(0, 100, 2)])
    claims.cursor = 10
    assert claims.claim_runs(3, 64) == [(11, 1), (13, 1), (15, 1)]
    assert claims.cursor == 16
    assert claims.claim_runs(64, 2) == [(17, 1), (19, 1)]
    assert claims.claim_runs(64, 64)[-1] == (99, 1), "not beyond its area"
    assert claims.claim_runs(64, 64) == [(100, 50)]
    assert claims.claim_runs(64, 64) == [(1, 1), (3, 1), (5, 1), (7, 1), (9, 1)]
    assert claims.claim_runs(64, 64) == []


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4),
    st.lists(
        st.one_of(
            st.tuples(st.just("claim"), st.lists(st.integers(0, 1000), max_size=5)),
            st.tuples(st.just("run"), st.integers(1, 20)),
            st.tuples(st.just("range"), st.tuples(st.integers(0, 1000), st.integers(1, 50))),
        ),
        max_size=40,
    ),
)
def test_every_slot_once(sizes: list[int], steps: list[tuple[str, object]]) -> None:
    claims = ClaimMap.create(Slots(sizes))
    total = sum(sizes)
    seen: list[int] = []
    for what, how in steps:
        if what == "claim":
            assert isinstance(how, list)
            seen += claims.claim([n % total for n in how])
        elif what == "run":
            assert isinstance(how, int)
            runs = claims.claim_runs(how, 3)
            assert len(runs) <= 3 and sum(count for _, count in runs) <= how
            ends = [slot for run in runs for slot in (run[0], sum(run) - 1)]
            assert ends == sorted(ends)
            assert len({claims.slots.area_of(slot) for slot in ends}) <= 1
            seen += [slot for run in runs for slot in range(run[0], sum(run))]
        else:
            assert isinstance(how, tuple)
            start = how[0] % total
            for first, count in claims.claim_range(start, min(how[1], total - start)):
                seen += range(first, first + count)
    while runs := claims.claim_runs(7, 2):
        seen += [slot for run in runs for slot in range(run[0], sum(run))]
    assert sorted(seen) == list(range(total))
    claims.close()


CLAIMER = """
import sys, random
from pyumem.claims import ClaimMap, Slots
claims = ClaimMap.attach(int(sys.argv[1]), Slots([20000]))
mine = []
chooser = random.Random(int(sys.argv[2]))
while runs := claims.claim_runs(7, 3):
    for run in runs:
        mine += range(run[0], sum(run))
    mine += claims.claim([chooser.randrange(20000) for _ in range(3)])
print(*mine)
"""


def test_processes_share_it() -> None:
    claims = ClaimMap.create(Slots([20000]))
    fd = claims.memory.fd
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIMER, str(fd), str(n)], pass_fds=[fd], stdout=subprocess.PIPE
        )
        for n in range(3)
    ]
    seen = [int(word) for worker in workers for word in worker.communicate()[0].split()]
    assert sorted(seen) == list(range(20000))
    claims.close()


HOLDER = """
import sys, time
from pyumem.shm import ProcessLock
with ProcessLock(int(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_killed_holder_lets_go() -> None:
    claims = ClaimMap.create(Slots([10]))
    fd = claims.memory.fd
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(fd)], pass_fds=[fd], stdout=subprocess.PIPE
    )
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    started = time.monotonic()
    timer = subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -9 {holder.pid}"])
    assert claims.claim([1]) == [1]
    assert 0.1 < time.monotonic() - started < 20
    assert holder.wait() == -signal.SIGKILL
    timer.wait()
    holder.stdout.close()
    claims.close()


def test_a_foreign_map_is_refused() -> None:
    claims = ClaimMap.create(Slots([10]))
    with pytest.raises(ValueError, match="claim map"):
        ClaimMap.attach(os.dup(claims.memory.fd), Slots([11]))
    claims.close()


@given(
    st.lists(st.tuples(st.sampled_from([0, 255, 170]), st.integers(1, 9000)), max_size=4),
    st.integers(1, 2),
)
def test_bits_are_spread(stretches: list[tuple[int, int]], value: int) -> None:
    bits = b"".join(bytes((byte,)) * count for byte, count in stretches)
    expected = bytearray()
    for byte in bits:
        expected += bytes(value * (byte >> bit & 1) for bit in range(8))
    assert spread(memoryview(bits), value) == expected
