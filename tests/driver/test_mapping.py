# SPDX-License-Identifier: GPL-2.0-or-later
"""What a consumer may do to its mapping: pieces of it, other places, other rights, neighbours."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import pytest

from pyumem.area import Area

from .support import (
    MADV_DONTNEED,
    MAP_FIXED,
    MAP_PRIVATE,
    MAP_SHARED,
    MREMAP_FIXED,
    MREMAP_MAYMOVE,
    PAGE,
    PROT_NONE,
    PROT_READ,
    RW,
    SHORT,
    Agent,
    AgentError,
    AgentSignal,
    Server,
    content,
    fill,
    no_request,
    serve,
    take_pages,
)

NPAGES = 64


@pytest.fixture
def base(area: Area, agent: Agent) -> int:
    return agent.map_node(area)


def expect_served(area: Area, agent: Agent, address: int, page: int) -> None:
    """The page at this address is missing: it is asked for, waited for, and then right."""
    pending = agent.start("peek", address, slot=1)
    assert take_pages(area, 1) == [page]
    assert not pending.done(0.02)
    serve(area, page)
    assert pending.value() == content(page)


def expect_segv(agent: Agent, address: int, command: str = "peek") -> None:
    with pytest.raises(AgentSignal, match="SIGSEGV"):
        agent.do(command, address, 1)


def expect_errno(number: int, agent: Agent, name: str, *args: int) -> None:
    with pytest.raises(AgentError) as caught:
        agent.sys(name, *args)
    assert caught.value.errno == number


def test_offsets_and_sizes_that_are_refused(area: Area, agent: Agent) -> None:
    fd = agent.open(area.node)
    for count, pgoff in (
        (NPAGES + 1, 0),
        (1, NPAGES),
        (NPAGES, 1),
        (2, NPAGES - 1),
        (1, NPAGES + 1),
        (1, 1 << 40),
        (NPAGES, (1 << 51) - NPAGES),
    ):
        expect_errno(errno.EINVAL, agent, "mmap", 0, count * PAGE, RW, 1, fd, pgoff * PAGE)
    # The sum of offset and length wraps: refused by mmap() itself or by the driver.
    with pytest.raises(AgentError) as caught:
        agent.sys("mmap", 0, 2 * PAGE, RW, 1, fd, (1 << 64) - PAGE)
    assert caught.value.errno in (errno.EINVAL, errno.EOVERFLOW)
    assert not area.info().mapped
    expect_served(area, agent, agent.mmap(fd, 1, pgoff=NPAGES - 1), NPAGES - 1)


def test_parts_of_an_area_at_several_places(area: Area, agent: Agent) -> None:
    fd = agent.open(area.node)
    one = agent.mmap(fd, 10, pgoff=20)
    two = agent.mmap(fd, 10, pgoff=25)
    expect_served(area, agent, one + 6 * PAGE, 26)
    agent.do("poke", one + 6 * PAGE, 5)
    assert agent.word(two, 1) == 5
    expect_served(area, agent, two, 25)
    assert agent.word(one, 5) == content(25)
    no_request(area, within=0.05)


def test_unmapped_in_pieces(area: Area, agent: Agent, base: int) -> None:
    agent.sys("munmap", base + 10 * PAGE, 20 * PAGE)
    expect_segv(agent, base + 10 * PAGE)
    expect_segv(agent, base + 29 * PAGE)
    expect_served(area, agent, base + 9 * PAGE, 9)
    expect_served(area, agent, base + 30 * PAGE, 30)
    agent.sys("munmap", base, 10 * PAGE)
    assert area.info().mapped
    expect_served(area, agent, base + 63 * PAGE, 63)
    agent.sys("munmap", base + 30 * PAGE, 34 * PAGE)
    assert not area.info().mapped


def test_moved_as_a_whole(area: Area, agent: Agent, base: int) -> None:
    serve(area, 3)
    target = agent.reserve(NPAGES)
    moved = agent.sys("mremap", base, area.size, area.size, MREMAP_MAYMOVE | MREMAP_FIXED, target)
    assert moved == target
    expect_segv(agent, base + 3 * PAGE)
    assert agent.word(target, 3) == content(3)
    expect_served(area, agent, target + 4 * PAGE, 4)


def test_moved_in_part_while_somebody_waits(area: Area, agent: Agent, base: int) -> None:
    waiting = agent.touch(base, 5, slot=2)
    assert take_pages(area, 1) == [5]
    target = agent.reserve(10)
    agent.sys("mremap", base, 10 * PAGE, 10 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, target)
    serve(area, 5)
    with pytest.raises(AgentSignal, match="SIGSEGV"):
        waiting.value()
    assert agent.word(target, 5) == content(5)
    expect_served(area, agent, target + 9 * PAGE, 9)
    expect_served(area, agent, base + 10 * PAGE, 10)


def test_duplicated_by_mremap(area: Area, agent: Agent, base: int) -> None:
    """An old size of zero asks for a second mapping of the same pages."""
    try:
        second = agent.sys("mremap", base, 0, area.size, MREMAP_MAYMOVE)
    except AgentError as e:  # a driver may refuse it, it must not do it wrongly
        assert e.errno in (errno.EFAULT, errno.EINVAL)
        expect_served(area, agent, base, 0)
        return
    expect_served(area, agent, second + 7 * PAGE, 7)
    assert agent.word(base, 7) == content(7)
    agent.sys("munmap", base, area.size)
    assert area.info().mapped
    agent.sys("munmap", second, area.size)
    assert not area.info().mapped


def test_shrunk_and_grown_within_the_area(area: Area, agent: Agent, base: int) -> None:
    assert agent.sys("mremap", base, area.size, 10 * PAGE, 0) == base
    expect_segv(agent, base + 10 * PAGE)
    try:
        base = agent.sys("mremap", base, 10 * PAGE, 20 * PAGE, MREMAP_MAYMOVE)
    except AgentError as e:  # a driver may refuse it, it must not do it wrongly
        assert e.errno == errno.EFAULT
        return
    expect_served(area, agent, base + 19 * PAGE, 19)


@pytest.mark.parametrize("complete", [False, True])
def test_grown_past_the_end(area: Area, agent: Agent, base: int, complete: bool) -> None:
    """There is nothing behind the end, whether or not the driver lets the mapping grow there."""
    serve(area, 0, NPAGES if complete else 1)
    try:
        base = agent.sys("mremap", base, area.size, area.size + 8 * PAGE, MREMAP_MAYMOVE)
    except AgentError as e:
        assert e.errno == errno.EFAULT
        return
    for page in (NPAGES, NPAGES + 7):
        for command in ("peek", "poke"):
            with pytest.raises(AgentSignal, match="SIGBUS"):
                agent.do(command, base + page * PAGE, 1)
    assert agent.word(base, 0) == content(0)
    no_request(area, within=0.05)


def test_protection_changes(area: Area, agent: Agent, base: int) -> None:
    serve(area, 1)
    agent.sys("mprotect", base, 4 * PAGE, PROT_READ)
    assert agent.word(base, 1) == content(1)
    expect_segv(agent, base + PAGE, "poke")
    expect_segv(agent, base + 2 * PAGE, "poke")  # missing: the right is looked at first
    no_request(area, within=0.05)
    expect_served(area, agent, base + 3 * PAGE, 3)
    agent.sys("mprotect", base, 4 * PAGE, PROT_NONE)
    expect_segv(agent, base + PAGE)
    agent.sys("mprotect", base, 4 * PAGE, RW)
    agent.do("poke", base + PAGE, 9)
    assert agent.word(base, 1) == 9
    expect_served(area, agent, base, 0)


def test_protection_taken_away_from_a_waiter(area: Area, agent: Agent, base: int) -> None:
    waiting = agent.touch(base, 2, slot=1)
    take_pages(area, 1)
    agent.sys("mprotect", base, area.size, PROT_NONE)
    serve(area, 2)
    with pytest.raises(AgentSignal, match="SIGSEGV"):
        waiting.value()
    agent.sys("mprotect", base, area.size, RW)
    assert agent.word(base, 2) == content(2)


def test_a_node_opened_for_reading_only(area: Area, agent: Agent) -> None:
    fd = agent.open(area.node, os.O_RDONLY)
    expect_errno(errno.EACCES, agent, "mmap", 0, area.size, RW, MAP_SHARED, fd, 0)
    base = agent.mmap(fd, NPAGES, prot=PROT_READ)
    expect_errno(errno.EACCES, agent, "mprotect", base, area.size, RW)
    expect_served(area, agent, base, 0)
    expect_segv(agent, base, "poke")


def test_a_private_map_of_the_node_can_only_be_read(area: Area, agent: Agent) -> None:
    """Trap 14: a page copied on write would leave the served state."""
    fd = agent.open(area.node)
    expect_errno(errno.EINVAL, agent, "mmap", 0, area.size, RW, MAP_PRIVATE, fd, 0)
    expect_errno(errno.EINVAL, agent, "mmap", 0, area.size, 2, MAP_PRIVATE, fd, 0)
    base = agent.mmap(fd, NPAGES, prot=PROT_READ, flags=MAP_PRIVATE)
    expect_served(area, agent, base + 5 * PAGE, 5)
    for prot in (RW, 2, RW | 4):
        expect_errno(errno.EACCES, agent, "mprotect", base, PAGE, prot)
    expect_segv(agent, base + 5 * PAGE, "poke")
    # It is the shared page that is seen.
    shared = agent.mmap(fd, NPAGES)
    agent.do("poke", shared + 5 * PAGE, 6)
    assert agent.word(base, 5) == 6


def test_dropping_a_mapped_page_keeps_its_content(area: Area, agent: Agent, base: int) -> None:
    """MADV_DONTNEED of a shared mapping only takes the page table entries."""
    serve(area, 0, 8)
    agent.do("poke", base + 3 * PAGE, 42)
    agent.sys("madvise", base, 16 * PAGE, MADV_DONTNEED)
    assert agent.word(base, 3) == 42
    assert agent.word(base, 4) == content(4)
    expect_served(area, agent, base + 9 * PAGE, 9)
    no_request(area, within=0.05)


def test_dropping_a_missing_page_leaves_its_waiter(area: Area, agent: Agent, base: int) -> None:
    waiting = agent.touch(base, 9, slot=1)
    take_pages(area, 1)
    agent.sys("madvise", base, area.size, MADV_DONTNEED)
    assert not waiting.done(SHORT)
    serve(area, 9)
    assert waiting.value() == content(9)


def vmas(agent: Agent, low: int, high: int) -> list[str]:
    """Lines of /proc/PID/maps within an address range."""
    lines = []
    with open(f"/proc/{agent.pid}/maps") as maps:  # noqa: PTH123
        for line in maps:
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            if start < high and end > low:
                lines.append(line.strip())
    return lines


@pytest.mark.parametrize("first", ["node", "backing"])
def test_a_servers_mapping_is_not_merged_with_a_consumers(
    area: Area, new_agent: Callable[..., Agent], first: str
) -> None:
    """Trap 9: same inode, adjacent in memory and in the file, same rights, in one process.

    Merged, the server's half would be served by itself, or the consumer's half by nobody.
    """
    agent = new_agent(pass_fds=[area.shmem_fd])
    node = agent.open(area.node)
    room = agent.reserve(NPAGES)
    half = NPAGES // 2
    fds = (node, area.shmem_fd) if first == "node" else (area.shmem_fd, node)
    for n, fd in enumerate(fds):
        where = room + n * half * PAGE
        agent.mmap(fd, half, pgoff=n * half, addr=where, flags=MAP_SHARED | MAP_FIXED)
    consumer, server = (0, half) if first == "node" else (half, 0)

    def check(offset: int) -> None:
        assert len(vmas(agent, room, room + area.size)) >= 2
        expect_served(area, agent, room + (consumer + offset) * PAGE, consumer + offset)
        assert agent.word(room, server + offset) == 0  # a hole of the backing file, no fault
        no_request(area, within=0.02)

    check(0)
    check(half - 1)
    # A change of rights and back makes the kernel look for something to merge.
    for prot in (PROT_READ, RW):
        agent.sys("mprotect", room, area.size, prot)
    check(half // 2)
    for prot in (PROT_READ, RW):
        agent.sys("mprotect", room + (half - 2) * PAGE, 4 * PAGE, prot)
    check(half // 2 + 1)
    agent.sys("munmap", room + (half - 3) * PAGE, 6 * PAGE)
    assert area.info().mapped
    agent.sys("munmap", room + consumer * PAGE, half * PAGE)
    assert not area.info().mapped
    assert agent.word(room, server + half // 2) == 0


def test_adjacent_mappings_of_one_area(area: Area, agent: Agent) -> None:
    """Merged or not: all of it is served, and the last piece to go is noticed."""
    node, again = agent.open(area.node), agent.open(area.node)
    room = agent.reserve(NPAGES)
    pieces = (0, 10, 20, 30, 40, 50)
    for n, pgoff in enumerate(pieces):
        agent.mmap(
            node if n % 3 else again,
            10,
            pgoff=pgoff,
            addr=room + pgoff * PAGE,
            flags=MAP_SHARED | MAP_FIXED,
        )
    for page in (0, 9, 10, 29, 30, 59):
        expect_served(area, agent, room + page * PAGE, page)
    for prot in (PROT_READ, RW):
        agent.sys("mprotect", room, 60 * PAGE, prot)
        agent.sys("mprotect", room + 5 * PAGE, 40 * PAGE, prot)
    for page in (1, 11, 28, 31, 58):
        expect_served(area, agent, room + page * PAGE, page)
    for page in range(59, -1, -3):
        assert area.info().mapped
        agent.sys("munmap", room + (page - 2) * PAGE, 3 * PAGE)
    assert not area.info().mapped


def test_mapped_over_itself_and_over_something_else(area: Area, agent: Agent, base: int) -> None:
    waiting = agent.touch(base, 12, slot=2)
    take_pages(area, 1)
    fd = agent.open(area.node)
    # The same place, another part of the area: the waiter's address is page 22 now.
    agent.mmap(fd, 10, pgoff=20, addr=base + 10 * PAGE, flags=MAP_SHARED | MAP_FIXED)
    serve(area, 12)
    assert take_pages(area, 1) == [22]
    serve(area, 22)
    assert waiting.value() == content(22)
    # And anonymous memory in its place: zeros are right there.
    agent.sys("mmap", base, PAGE, RW, MAP_PRIVATE | MAP_FIXED | 0x20, -1, 0)
    assert agent.word(base, 0) == 0
    expect_served(area, agent, base + PAGE, 1)


@pytest.mark.parametrize("holes", [(), (7, 8, 31, 50)])
def test_faults_map_cached_neighbours_and_never_missing_ones(
    new_area: Callable[[int], Area], agent: Agent, holes: tuple[int, ...]
) -> None:
    """Trap 2: fault-around must not let a missing page in, and must save faults otherwise.

    The first 2 MiB are cached but for the holes; the rest is missing.
    """
    area = new_area(1024)
    align = 512 * PAGE
    base = agent.map_node(area, addr=agent.reserve(1024, align))
    fill(area, 0, 1024)  # the missing ones too: their content must not be seen before the mark
    area.mark((page, 1) for page in range(512) if page not in holes)
    # A first fault, far from the others, for the page table itself.
    assert agent.word(base, 511) == content(511)
    tid = agent.tid(0)
    before = int(agent.stat(tid, 10))  # minor faults of that thread
    touched = [page for page in range(64) if page not in holes]
    for page in touched:
        assert agent.word(base, page) == content(page)
    faults = int(agent.stat(tid, 10)) - before
    assert holes or faults < len(touched) // 2, f"{faults} faults for {len(touched)} pages"
    no_request(area, within=0.02)
    for page in (*holes, 512, 600):
        expect_served(area, agent, base + page * PAGE, page)


def test_fault_around_stops_at_the_end_of_the_mapping(area: Area, agent: Agent) -> None:
    fd = agent.open(area.node)
    serve(area, 0, NPAGES)
    room = agent.reserve(NPAGES)
    agent.mmap(fd, 5, pgoff=10, addr=room + 10 * PAGE, flags=MAP_SHARED | MAP_FIXED)
    assert agent.word(room, 12) == content(12)
    expect_segv(agent, room + 9 * PAGE)
    expect_segv(agent, room + 15 * PAGE)
    assert agent.do("words", room + 10 * PAGE, 5, PAGE) == [content(n) for n in range(10, 15)]


def test_a_complete_area_needs_no_server(area: Area, agent: Agent, base: int) -> None:
    with Server(area):
        assert agent.word(base, 3) == content(3)
    serve(area, 0, NPAGES)
    assert area.info().complete
    area.close()
    assert agent.do("words", base, NPAGES, PAGE) == [content(n) for n in range(NPAGES)]
    agent.do("poke", base, 1)
    assert agent.word(base, 0) == 1
