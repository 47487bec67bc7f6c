# SPDX-License-Identifier: GPL-2.0-or-later
"""Trap 1: no way of getting a huge page into the backing file lets missing pages be read.

A huge page is mapped as a whole, so one cached page of it would show its missing neighbours as
zeros.  The tests only mean something on a kernel that does make huge pages of shared memory; the
positive controls make sure of that, with the same calls on a plain memfd.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyumem.area import Area

from .support import (
    MADV_COLLAPSE,
    MADV_DONTNEED,
    MADV_HUGEPAGE,
    MAP_FIXED,
    MAP_SHARED,
    PAGE,
    Agent,
    AgentError,
    Server,
    content,
    fill,
    no_request,
    readable,
    serve,
)

HUGE = 512  # pages
KNOB = Path("/sys/kernel/mm/transparent_hugepage")


@pytest.fixture(params=["advise", "always", "force"])
def shmem_enabled(request: pytest.FixtureRequest) -> Iterator[str]:
    """What the administrator has set for huge pages in shared memory."""
    knob = KNOB / "shmem_enabled"
    before = knob.read_text().partition("[")[2].partition("]")[0]
    knob.write_text(request.param)
    yield request.param
    knob.write_text(before)


@pytest.fixture
def big(new_area: Callable[[int], Area]) -> Area:
    """Two huge pages' worth of area."""
    return new_area(2 * HUGE)


def map_aligned(agent: Agent, area: Area, fd: int) -> int:
    """Map all of an area so that huge pages could be used."""
    return agent.mmap(
        fd, area.npages, addr=agent.reserve(area.npages, HUGE * PAGE), flags=MAP_SHARED | MAP_FIXED
    )


def shmem_huge(agent: Agent, base: int) -> int:
    """KiB that the agent has mapped by huge pages of shared memory at this address."""
    return int(agent.smaps(base, "ShmemPmdMapped")[0])


def collapse(agent: Agent, address: int) -> int:
    """MADV_COLLAPSE one huge page; return 0 or the errno.  Tried again while pages are in use."""
    number = 0
    for _ in range(5):
        try:
            return agent.sys("madvise", address, HUGE * PAGE, MADV_COLLAPSE)
        except AgentError as e:
            number = e.errno or -1
            time.sleep(0.05)
    return number


def check_neighbours(area: Area, agent: Agent, base: int) -> None:
    """Touch cached page 5 and its missing neighbours: whatever is answered must be right."""
    pages = [5, 6, 4, 0, 511, 300, HUGE, HUGE + 5]
    pending = [(page, agent.touch(base, page, slot)) for slot, page in enumerate(pages, 1)]
    readable(area.server_fd, 1)
    time.sleep(0.1)
    for page, p in pending[1:]:
        if p.done():
            raise AssertionError(f"missing page {page} was answered: {p.values()}")
    with Server(area):
        for page, p in pending:
            assert p.value() == content(page), f"page {page}"
    # Look at what is in the file, not at what is in the page tables.
    agent.sys("madvise", base, area.size, MADV_DONTNEED)
    for page in pages:
        assert agent.word(base, page) == content(page)


def test_control_collapse_works_on_plain_shared_memory(agent: Agent) -> None:
    """Without this the tests below would prove nothing."""
    memfd = os.memfd_create("plain")
    os.ftruncate(memfd, 2 * HUGE * PAGE)
    fd = agent.open(f"/proc/{os.getpid()}/fd/{memfd}")
    base = agent.mmap(
        fd, 2 * HUGE, addr=agent.reserve(2 * HUGE, HUGE * PAGE), flags=MAP_SHARED | MAP_FIXED
    )
    agent.do("poke", base + 5 * PAGE, 5)
    assert collapse(agent, base) == 0
    assert agent.word(base, 5) == 5
    assert agent.word(base, 6) == 0  # the neighbour that nobody wrote: mapped, and zero
    assert shmem_huge(agent, base) == HUGE * PAGE // 1024
    os.close(memfd)


def test_control_force_makes_huge_pages(agent: Agent) -> None:
    """shmem_enabled=force does so at the first touch of any shared memory."""
    knob = KNOB / "shmem_enabled"
    before = knob.read_text().partition("[")[2].partition("]")[0]
    knob.write_text("force")
    try:
        memfd = os.memfd_create("plain")
        os.ftruncate(memfd, 2 * HUGE * PAGE)
        fd = agent.open(f"/proc/{os.getpid()}/fd/{memfd}")
        base = agent.mmap(
            fd, 2 * HUGE, addr=agent.reserve(2 * HUGE, HUGE * PAGE), flags=MAP_SHARED | MAP_FIXED
        )
        agent.do("poke", base, 5)
        assert shmem_huge(agent, base) == HUGE * PAGE // 1024
        os.close(memfd)
    finally:
        knob.write_text(before)


@pytest.mark.usefixtures("shmem_enabled")
@pytest.mark.parametrize("when", ["before", "after"])
def test_advised_or_forced_huge_pages(
    big: Area, new_agent: Callable[..., Agent], when: str
) -> None:
    """Both ends ask for huge pages; the server fills through a mapping of its own."""
    server = new_agent(pass_fds=[big.shmem_fd])
    consumer = new_agent()
    backing = map_aligned(server, big, big.shmem_fd)
    server.sys("madvise", backing, big.size, MADV_HUGEPAGE)
    base = 0
    if when == "before":
        base = map_aligned(consumer, big, consumer.open(big.node))
        consumer.sys("madvise", base, big.size, MADV_HUGEPAGE)
    server.do("fill", backing + 5 * PAGE, 512, content(5))
    big.mark([(5, 1)])
    if when == "after":
        base = map_aligned(consumer, big, consumer.open(big.node))
        consumer.sys("madvise", base, big.size, MADV_HUGEPAGE)
    check_neighbours(big, consumer, base)


@pytest.mark.parametrize("seen", [False, True], ids=["untouched", "mapped"])
def test_collapsed_by_the_server(
    big: Area, new_agent: Callable[..., Agent], shmem_enabled: str, seen: bool
) -> None:
    """One cached page, collapsed with 511 missing ones around it, then touched."""
    server = new_agent(pass_fds=[big.shmem_fd])
    consumer = new_agent()
    backing = map_aligned(server, big, big.shmem_fd)
    base = map_aligned(consumer, big, consumer.open(big.node))
    server.do("fill", backing + 5 * PAGE, 512, content(5))
    big.mark([(5, 1)])
    if seen and shmem_enabled != "force":  # there the whole huge page is waited for
        assert consumer.word(base, 5) == content(5)
    collapse(server, backing)
    check_neighbours(big, consumer, base)


def test_a_collapse_by_the_server_does_happen(big: Area, new_agent: Callable[..., Agent]) -> None:
    """The control of the test above: the file does get a huge page, and whoever waits for one of
    its pages is served when all of them are.
    """
    server = new_agent(pass_fds=[big.shmem_fd])
    consumer = new_agent()
    backing = map_aligned(server, big, big.shmem_fd)
    server.do("poke", backing, 1)
    assert collapse(server, backing) == 0
    assert shmem_huge(server, backing) == HUGE * PAGE // 1024
    base = map_aligned(consumer, big, consumer.open(big.node))
    fill(big, 0, HUGE)
    big.mark([(0, HUGE - 1)])
    last = consumer.touch(base, HUGE - 1, slot=1)
    other = consumer.touch(base, 3, slot=2)
    assert not last.done(0.1)
    if other.done():
        assert other.value() == content(3)
    big.mark([(HUGE - 1, 1)])
    assert last.value() == content(HUGE - 1)
    assert consumer.word(base, 3) == content(3)


@pytest.mark.parametrize("cached", [1, HUGE])
def test_collapsed_by_the_consumer(big: Area, agent: Agent, cached: int) -> None:
    """Refused, or right: the driver is not asked for a page that a collapse maps."""
    base = map_aligned(agent, big, agent.open(big.node))
    first = 5 if cached == 1 else 0
    serve(big, first, cached)
    assert agent.word(base, first) == content(first)
    collapse(agent, base)
    collapse(agent, base + HUGE * PAGE)
    pages = [HUGE, HUGE + 7] if cached == HUGE else [0, 4, 6, 511]
    pending = [(page, agent.touch(base, page, slot)) for slot, page in enumerate(pages, 1)]
    time.sleep(0.1)
    for page, p in pending:
        assert not p.done(), f"missing page {page} was answered: {p.values()}"
    with Server(big):
        for page, p in pending:
            assert p.value() == content(page)
    assert agent.word(base, first) == content(first)
    no_request(big, within=0.02)


def test_collapsed_while_consumers_read(big: Area, new_agent: Callable[..., Agent]) -> None:
    """Server collapses again and again, pages are marked one by one, and read as they come."""
    server = new_agent(pass_fds=[big.shmem_fd])
    consumer = new_agent()
    backing = map_aligned(server, big, big.shmem_fd)
    base = map_aligned(consumer, big, consumer.open(big.node))
    pages = list(range(0, HUGE, 37))
    pending = [(page, consumer.touch(base, page, slot)) for slot, page in enumerate(pages, 1)]
    for n, page in enumerate(pages):
        fill(big, page)
        big.mark([(page, 1)])
        if n % 3 == 0:
            collapse(server, backing)
        for other, p in pending[n + 1 :]:
            assert not p.done(), f"missing page {other} was answered: {p.values()}"
    with Server(big):
        for page, p in pending:
            assert p.value() == content(page)
