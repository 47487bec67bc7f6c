# SPDX-License-Identifier: GPL-2.0-or-later
"""Trap 11: what the consumer discards is zero, at once or when it is marked, and stays so."""

from __future__ import annotations

import errno
import os
import threading

import pytest

from pyumem import uapi
from pyumem.area import Area

from .support import (
    MADV_REMOVE,
    PAGE,
    PROT_READ,
    SHORT,
    WORDS,
    Agent,
    AgentError,
    content,
    fill,
    no_request,
    serve,
    take,
)

DISCARDED = uapi.UMEM_REQUEST_DISCARDED


@pytest.fixture
def base(area: Area, agent: Agent) -> int:
    return agent.map_node(area)


def discard(agent: Agent, base: int, pgoff: int, count: int = 1) -> None:
    agent.sys("madvise", base + pgoff * PAGE, count * PAGE, MADV_REMOVE)


def discarded(area: Area, nr: int) -> list[int]:
    """Take `nr` requests, all of which must carry the flag; return their pages, sorted."""
    requests = take(area, nr)
    assert all(flags & DISCARDED for _, flags in requests), requests
    return sorted(pgoff for pgoff, _ in requests)


def test_a_cached_page_becomes_zero_and_stays_cached(area: Area, agent: Agent, base: int) -> None:
    serve(area, 3, 3)
    agent.do("poke", base + 4 * PAGE, 1)
    blocks = os.fstat(area.shmem_fd).st_blocks
    discard(agent, base, 4)
    assert agent.page_is(base, 4, 0)
    assert agent.do("words", base + 3 * PAGE, 3, PAGE) == [content(3), 0, content(5)]
    assert area.info().nr_cached == 3
    no_request(area)
    assert os.fstat(area.shmem_fd).st_blocks <= blocks
    agent.do("poke", base + 4 * PAGE, 8)  # and is memory like any other
    assert agent.word(base, 4) == 8


def test_discarding_gives_memory_back(area: Area, agent: Agent, base: int) -> None:
    serve(area, 0, 64)
    full = os.fstat(area.shmem_fd).st_blocks
    discard(agent, base, 16, 32)
    assert os.fstat(area.shmem_fd).st_blocks == full // 2


def test_a_missing_page_is_asked_for_with_the_flag(area: Area, agent: Agent, base: int) -> None:
    """It is not to be fetched: mark it, and it reads as zeros."""
    discard(agent, base, 9)
    assert discarded(area, 1) == [9]
    pending = agent.touch(base, 9, slot=1)
    assert not pending.done(SHORT)  # still missing: it may be on its way
    no_request(area, within=0.02)  # asked for once
    assert area.mark([(9, 1)]) == 1
    assert pending.value() == 0
    assert agent.page_is(base, 9, 0)


def test_what_was_filled_before_the_discard_is_gone(area: Area, agent: Agent, base: int) -> None:
    fill(area, 20, 2)
    discard(agent, base, 20)
    area.mark([(20, 2)])
    assert agent.page_is(base, 20, 0)
    assert agent.page_is(base, 21, content(21))  # the neighbour was not discarded


def test_what_is_filled_after_the_discard_is_gone_too(area: Area, agent: Agent, base: int) -> None:
    """The page was on its way: the server fills it in good faith, and the mark zeroes it."""
    discard(agent, base, 20)
    fill(area, 20, 2)
    area.mark([(20, 2)])
    assert agent.page_is(base, 20, 0)
    assert agent.page_is(base, 21, content(21))
    assert area.map[20 * PAGE] == 0
    assert take_pages_now(area) == []


def take_pages_now(area: Area) -> list[int]:
    area.set_blocking(False)
    return list(area.requests()[::2])


def test_a_page_in_flight_is_zero_in_the_end(area: Area, agent: Agent, base: int) -> None:
    """Wanted by one thread, delivered to the server, then discarded by another."""
    pending = agent.touch(base, 30, slot=1)
    assert take(area, 1) == [(30, 0)]
    discard(agent, base, 30)
    assert not pending.done(SHORT)
    # Whether it is delivered again, now with the flag, is the driver's choice.
    assert set(take_pages_now(area)) <= {30}
    serve(area, 30)
    assert pending.value() == 0
    assert agent.page_is(base, 30, 0)


def test_a_request_not_yet_delivered_gets_the_flag(area: Area, agent: Agent, base: int) -> None:
    pending = agent.touch_all(base, [31])
    discard(agent, base, 31)
    assert discarded(area, 1) == [31]
    area.mark([(31, 1)])
    assert pending[0].value() == 0


def test_a_range_of_both_kinds(area: Area, agent: Agent, base: int) -> None:
    serve(area, 10, 5)
    discard(agent, base, 8, 10)
    missing = [8, 9, 15, 16, 17]
    assert discarded(area, len(missing)) == missing
    assert agent.do("words", base + 10 * PAGE, 5, PAGE) == [0] * 5
    serve(area, 0, 10)
    serve(area, 15, 49)
    expected = [0 if 8 <= page < 18 else content(page) for page in range(64)]
    assert agent.do("words", base, 64, PAGE) == expected


def test_marked_again_it_is_not_zeroed_again(area: Area, agent: Agent, base: int) -> None:
    """Marking what is cached is harmless, also after a discard."""
    discard(agent, base, 40)
    area.mark([(40, 1)])
    agent.do("poke", base + 40 * PAGE, 123)
    assert area.mark([(40, 1), (39, 3)]) == 2
    assert agent.word(base, 40) == 123


def test_written_and_discarded_again(area: Area, agent: Agent, base: int) -> None:
    discard(agent, base, 41)
    area.mark([(41, 1)])
    agent.do("fill", base + 41 * PAGE, WORDS, 7)
    discard(agent, base, 41)
    assert agent.page_is(base, 41, 0)
    assert area.info().nr_cached == 1


def test_a_discard_survives_a_new_server(area: Area, agent: Agent, base: int) -> None:
    discard(agent, base, 5, 2)
    assert discarded(area, 2) == [5, 6]
    with Area.reattach(area.id, force=True) as successor:
        assert discarded(successor, 2) == [5, 6]
        serve(successor, 5, 2)
        assert agent.do("words", base + 5 * PAGE, 2, PAGE) == [0, 0]


def test_a_discard_of_the_whole_area(area: Area, agent: Agent, base: int) -> None:
    """Also when marks run at the same time, page by page."""
    marker = threading.Thread(target=lambda: [serve(area, n) for n in range(64)])
    marker.start()
    discard(agent, base, 0, 64)
    marker.join()
    area.mark([(0, 64)])
    assert area.info().complete
    assert agent.do("words", base, 64, PAGE) == [0] * 64


def test_more_discards_than_any_queue_is_long(agent: Agent) -> None:
    with Area.create("discards", 3000 * PAGE) as area:
        base = agent.map_node(area)
        discard(agent, base, 0, 3000)
        seen: set[int] = set()
        area.set_blocking(False)
        while words := list(area.requests()):
            assert all(flags & DISCARDED for flags in words[1::2])
            seen.update(words[::2])
        assert seen == set(range(3000))


def test_a_read_only_mapping_cannot_discard(area: Area, agent: Agent) -> None:
    fd = agent.open(area.node, os.O_RDONLY)
    base = agent.mmap(fd, 64, prot=PROT_READ)
    serve(area, 0)
    with pytest.raises(AgentError) as caught:
        discard(agent, base, 0, 2)
    assert caught.value.errno == errno.EACCES
    assert agent.word(base, 0) == content(0)
    no_request(area, within=0.02)


def test_the_server_may_punch_holes_before_the_mark(area: Area, agent: Agent, base: int) -> None:
    """Through its own descriptor a hole is a hole and no discard: it may change its mind."""
    libc_punch(area.shmem_fd, 50)
    fill(area, 50, 2)
    libc_punch(area.shmem_fd, 51)
    area.mark([(50, 2)])
    assert agent.do("words", base + 50 * PAGE, 2, PAGE) == [content(50), 0]
    no_request(area, within=0.02)


def libc_punch(fd: int, page: int) -> None:
    """fallocate(PUNCH_HOLE | KEEP_SIZE), which Python has not."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    done = libc.fallocate(fd, 3, ctypes.c_long(page * PAGE), ctypes.c_long(PAGE))
    assert done == 0, os.strerror(ctypes.get_errno())
