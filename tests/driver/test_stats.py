# SPDX-License-Identifier: GPL-2.0-or-later
"""Counters, the histogram and the tracepoints say what happened."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyumem import uapi
from pyumem.area import Area

from .support import Agent, content, fill, serve, take_pages, wait_until

TRACING = Path("/sys/kernel/tracing")


@pytest.fixture
def base(area: Area, agent: Agent) -> int:
    return agent.map_node(area)


def test_nothing_has_happened_yet(area: Area) -> None:
    stats = area.stats()
    assert all(not getattr(stats, name) for name in uapi._COUNTERS)
    assert stats.latency == (0,) * uapi.LATENCY_BUCKETS


def test_faults_are_counted_by_their_kind(area: Area, agent: Agent, base: int) -> None:
    serve(area, 0, 2)
    agent.word(base, 0)
    pending = agent.touch_all(base, [5, 5, 6])
    assert take_pages(area, 2) == [5, 6]
    serve(area, 5, 2)
    for p in pending:
        p.values()
    stats = area.stats()
    assert stats.nr_major == 3
    assert stats.nr_duplicate == 1
    assert stats.nr_requested == stats.nr_delivered == 2
    assert stats.nr_cached == 4
    assert stats.nr_minor >= 2  # page 0, and those who waited came again
    assert stats.nr_killed == stats.nr_async == stats.nr_lost == 0


def test_time_and_histogram(area: Area, agent: Agent, base: int) -> None:
    start = time.monotonic_ns()
    pending = agent.touch_all(base, [1])
    asleep = time.monotonic_ns()
    time.sleep(0.1)
    awake = time.monotonic_ns()
    serve(area, 1)
    pending[0].values()
    end = time.monotonic_ns()
    stats = area.stats()
    assert awake - asleep <= stats.blocked_ns <= end - start
    (bucket,) = [n for n, count in enumerate(stats.latency) if count]
    assert stats.latency[bucket] == 1
    assert 2**bucket <= stats.blocked_ns // 1000 < 2 ** (bucket + 1)


def test_who_is_killed_is_counted_and_not_in_the_histogram(
    area: Area, agent: Agent, base: int
) -> None:
    agent.touch_all(base, [1, 2])
    agent.kill(signal.SIGKILL)
    agent.wait()
    wait_until(lambda: area.stats().nr_killed == 2, "both are counted")
    assert sum(area.stats().latency) == 0


def test_sysfs_says_the_same(area: Area, agent: Agent, base: int) -> None:
    pending = agent.touch_all(base, [9])
    take_pages(area, 1)
    serve(area, 9)
    assert pending[0].value() == content(9)
    stats = area.stats()
    where = Path(f"/sys/class/umem/umem{area.id}/stats")
    names = {path.name for path in where.iterdir()}
    assert names == {*uapi._COUNTERS, "latency"}
    for name in uapi._COUNTERS:
        assert int((where / name).read_text()) == getattr(stats, name), name
    latency = tuple(map(int, (where / "latency").read_text().split()))
    assert latency == stats.latency


def test_counters_outlive_the_server(area: Area, agent: Agent, base: int) -> None:
    agent.touch_all(base, [3])
    take_pages(area, 1)
    number = area.id
    area.close()
    with Area.reattach(number) as successor:
        serve(successor, 3)
        assert successor.stats().nr_major == 1


@pytest.fixture
def trace() -> Iterator[Path]:
    """The kernel's trace, with our events switched on and nothing in it."""
    if not (TRACING / "trace").exists():
        import subprocess

        subprocess.run(["mount", "-t", "tracefs", "none", TRACING], check=True)
    enable = TRACING / "events/umem/enable"
    (TRACING / "trace").write_text("")
    enable.write_text("1")
    yield TRACING / "trace"
    enable.write_text("0")


def test_the_way_of_a_granule_can_be_traced(
    area: Area, agent: Agent, base: int, trace: Path
) -> None:
    pending = agent.touch_all(base, [7])
    take_pages(area, 1)
    fill(area, 7)
    area.mark([(7, 1)])
    assert pending[0].value() == content(7)
    with Area.reattach(area.id, force=True):
        pass
    seen = [
        line.split(": ")[1]
        for line in trace.read_text().splitlines()
        if f"umem{area.id}" in line and not line.startswith("#")
    ]
    way = ["umem_fault", "umem_request", "umem_deliver", "umem_mark", "umem_wake"]
    assert [name for name in seen if name in way] == way
    assert seen[-2:] == ["umem_attach", "umem_detach"]
    assert "pgoff=7" in trace.read_text()
