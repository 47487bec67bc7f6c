# SPDX-License-Identifier: GPL-2.0-or-later
"""The server's end: requests, marks, their order and their bounds."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import signal
import struct
import subprocess
import threading
import time
from collections.abc import Callable

import pytest

from pyumem import uapi
from pyumem.area import Area
from pyumem.errors import DriverError

from .build import program
from .support import (
    LONG,
    PAGE,
    SHORT,
    SLOW,
    Agent,
    content,
    fill,
    no_request,
    readable,
    serve,
    take,
    take_pages,
    wait_until,
)

UINT64_MAX = (1 << 64) - 1


def test_a_missing_page_is_waited_for(area: Area, agent: Agent) -> None:
    """The heart of it: never zeros, no answer before the mark, the right content after."""
    base = agent.map_node(area)
    pending = agent.touch(base, 7, slot=1)
    assert take(area, 1) == [(7, 0)]
    assert not pending.done(SHORT)
    fill(area, 7)
    assert not pending.done(SHORT)  # filling alone is not enough: it may be half of a page
    assert area.mark([(7, 1)]) == 1
    assert pending.value() == content(7)
    assert agent.page_is(base, 7, content(7))
    assert area.info().nr_cached == 1


def test_marked_without_a_fill_reads_as_zeros(area: Area, agent: Agent) -> None:
    base = agent.map_node(area)
    pending = agent.touch(base, 9, slot=1)
    take(area, 1)
    area.mark([(9, 1)])
    assert pending.value() == 0
    area.mark([(10, 1)])
    assert agent.page_is(base, 10, 0)


def test_marked_ahead_of_time_is_never_asked_for(area: Area, agent: Agent) -> None:
    base = agent.map_node(area)
    assert serve(area, 3, 4) == 4
    assert agent.do("words", base + 3 * PAGE, 4, PAGE) == [content(n) for n in range(3, 7)]
    no_request(area)
    assert area.info().nr_delivered == 0


def test_a_page_is_queued_once_however_many_want_it(area: Area, agent: Agent) -> None:
    base = agent.map_node(area)
    pending = agent.touch_all(base, [5] * 8)
    assert take_pages(area, 1) == [5]
    no_request(area)
    serve(area, 5)
    assert [p.value() for p in pending] == [content(5)] * 8
    assert area.info().nr_delivered == 1


def test_only_who_waits_for_the_marked_page_is_woken(
    new_area: Callable[[int], Area], agent: Agent
) -> None:
    """Nobody else's thread even runs, also where pages share one of 64 or 256 wait queues."""
    area = new_area(1024)
    pages = [1, 65, 257, 513, 2, 66]
    base = agent.map_node(area)
    pending = agent.touch_all(base, pages)
    tids = {page: agent.tid(slot) for slot, page in enumerate(pages, 1)}
    take(area, len(pages))
    switches = {page: agent.switches(tid) for page, tid in tids.items()}
    for n, page in enumerate(pages):
        serve(area, page)
        assert pending[n].value() == content(page)
        for m in range(n + 1, len(pages)):
            assert not pending[m].done()
            assert agent.switches(tids[pages[m]]) == switches[pages[m]], "woken for nothing"


def test_a_range_wakes_everybody_in_it(new_area: Callable[[int], Area], agent: Agent) -> None:
    """One longer than the number of buckets, with waiters at its ends."""
    area = new_area(300)
    base = agent.map_node(area)
    pages = [9, 10, 73, 138, 209, 210]
    pending = agent.touch_all(base, pages)
    take(area, len(pages))
    fill(area, 10, 200)
    assert area.mark([(10, 200)]) == 200
    for n, page in enumerate(pages):
        if 10 <= page < 210:
            assert pending[n].value() == content(page)
    assert not pending[0].done(SHORT)
    assert not pending[-1].done()
    serve(area, 9)
    serve(area, 210)
    assert pending[0].value() == content(9)
    assert pending[-1].value() == content(210)


@pytest.mark.parametrize("how", ["get", "read"])
def test_requests_come_in_the_order_of_the_faults(area: Area, agent: Agent, how: str) -> None:
    order = [40, 3, 63, 0, 17, 18, 16, 5]
    base = agent.map_node(area)
    pending = agent.touch_all(base, order)
    if how == "get":
        assert take_pages(area, len(order)) == order
    else:
        got = os.read(area.server_fd, 3 * 8)  # a partial read, then the rest
        assert len(got) == 24
        got += os.read(area.server_fd, 100 * 8 + 7)
        assert list(struct.unpack(f"={len(order)}Q", got)) == order
    for page in order:
        serve(area, page)
    assert [p.value() for p in pending] == [content(page) for page in order]


def test_small_rooms_get_all_in_order(area: Area, agent: Agent) -> None:
    order = [4, 2, 8, 6]
    base = agent.map_node(area)
    agent.touch_all(base, order)
    area.set_blocking(False)
    one = uapi.RequestBuffer(1)
    assert [one.get(area.server_fd)[0] for _ in order] == order
    assert len(one.get(area.server_fd)) == 0


def test_poll_tells_of_requests(area: Area, agent: Agent) -> None:
    poll = select.poll()
    poll.register(area.server_fd, select.POLLIN | select.POLLOUT)
    assert poll.poll(0) == [(area.server_fd, select.POLLOUT)]
    base = agent.map_node(area)
    agent.touch(base, 1, slot=1)
    assert readable(area.server_fd, LONG) == select.POLLIN
    assert poll.poll(0) == [(area.server_fd, select.POLLIN | select.POLLOUT)]
    take(area, 1)
    assert poll.poll(0) == [(area.server_fd, select.POLLOUT)]


def test_a_sleeping_poll_wakes(area: Area, agent: Agent) -> None:
    base = agent.map_node(area)
    timer = threading.Timer(0.2, agent.touch, [base, 1, 1])
    timer.start()
    assert readable(area.server_fd, LONG) == select.POLLIN
    timer.join()
    assert take_pages(area, 1) == [1]


def test_a_request_that_was_marked_meanwhile_is_not_delivered(area: Area, agent: Agent) -> None:
    base = agent.map_node(area)
    pending = agent.touch_all(base, [1, 2, 3])
    serve(area, 1)
    serve(area, 3)
    assert take_pages(area, 1) == [2]
    no_request(area, within=0.05)
    serve(area, 2)
    assert [p.value() for p in pending] == [content(1), content(2), content(3)]


@pytest.mark.parametrize("how", ["get", "read"])
def test_a_blocking_server_sleeps_and_wakes(area: Area, agent: Agent, how: str) -> None:
    """Other threads of Python run meanwhile, see uapi.RequestBuffer."""
    base = agent.map_node(area)
    got: list[int] = []

    def sleep() -> None:
        if how == "get":
            got.append(area.requests()[0])
        else:
            got.extend(struct.unpack("=Q", os.read(area.server_fd, 8)))

    area.set_blocking(True)
    thread = threading.Thread(target=sleep, daemon=True)
    thread.start()
    time.sleep(SHORT)
    assert not got
    assert thread.is_alive()
    pending = agent.touch(base, 21, slot=1)
    thread.join(LONG)
    assert got == [21]
    serve(area, 21)
    assert pending.value() == content(21)


def test_a_blocking_get_goes_on_after_a_signal(area: Area, agent: Agent) -> None:
    """The handler runs while the server sleeps (EINTR), and the call is made again."""
    base = agent.map_node(area)
    handled: list[int] = []

    def handler(signum: int, _frame: object) -> None:
        handled.append(signum)
        if len(handled) == 2:
            agent.touch(base, 30, slot=1)

    before = signal.signal(signal.SIGUSR2, handler)
    timers = [
        threading.Timer(delay, os.kill, [os.getpid(), signal.SIGUSR2]) for delay in (0.1, 0.3)
    ]
    area.set_blocking(True)
    for timer in timers:
        timer.start()
    try:
        assert list(area.requests()) == [30, 0]
    finally:
        for timer in timers:
            timer.join()
        signal.signal(signal.SIGUSR2, before)
    assert len(handled) == 2
    area.mark([(30, 1)])


def test_requests_that_cannot_be_handed_over_come_again(area: Area, agent: Agent) -> None:
    """EFAULT of a bad buffer loses nothing, whichever way it is asked."""
    order = [11, 5, 29, 2]
    base = agent.map_node(area)
    pending = agent.touch_all(base, order)
    area.set_blocking(False)
    arg = uapi.PAGE_REQUESTS.pack(requests=8, nr=4)
    with pytest.raises(OSError) as caught:
        fcntl.ioctl(area.server_fd, uapi.UMEM_GET_PAGE_REQUEST, arg)
    assert caught.value.errno == errno.EFAULT
    assert readable(area.server_fd) & select.POLLIN
    assert take_pages(area, 4) == order  # and in the same order
    serve(area, 0, 64)
    assert [p.value() for p in pending] == [content(n) for n in order]


def test_a_buffer_that_ends_in_the_middle(
    area: Area, agent: Agent, new_agent: Callable[..., Agent]
) -> None:
    """Two records fit before the fault: they are delivered, the others come again."""
    order = [11, 5, 29, 2]
    base = agent.map_node(area)
    agent.touch_all(base, order)
    area.set_blocking(False)
    server = new_agent(pass_fds=[area.server_fd])
    room = server.reserve(2)
    server.sys("mprotect", room, PAGE, 3)
    (arg,) = server.do("alloc", 4096)
    edge = room + PAGE - 2 * 16
    server.do("poke", arg, edge)
    server.do("poke", arg + 8, 4)
    server.sys("ioctl", area.server_fd, uapi.UMEM_GET_PAGE_REQUEST, arg)
    assert server.do("peek", arg + 8) == [2]
    assert server.do("words", edge, 4, 8) == [11, 0, 5, 0]
    assert take_pages(area, 2) == [29, 2]


def test_requests_survive_an_argument_that_is_read_only(
    area: Area, agent: Agent, new_agent: Callable[..., Agent]
) -> None:
    """The count cannot be told, so nothing was delivered: EFAULT, and they come again."""
    base = agent.map_node(area)
    agent.touch_all(base, [6, 4])
    area.set_blocking(False)
    server = new_agent(pass_fds=[area.server_fd])
    (room,) = server.do("alloc", 4096)
    page = server.sys("mmap", 0, PAGE, 3, 0x22, -1, 0)
    server.do("poke", page, room)
    server.do("poke", page + 8, 8)
    server.sys("mprotect", page, PAGE, 1)
    with pytest.raises(OSError) as caught:
        server.sys("ioctl", area.server_fd, uapi.UMEM_GET_PAGE_REQUEST, page)
    assert caught.value.errno == errno.EFAULT
    assert sorted(take_pages(area, 2)) == [4, 6]


def test_a_mark_whose_argument_is_read_only_marks_nothing(
    area: Area, new_agent: Callable[..., Agent]
) -> None:
    server = new_agent(pass_fds=[area.server_fd])
    page = server.sys("mmap", 0, PAGE, 3, 0x22, -1, 0)
    for n, word in enumerate((page + 64, 1, 0, 0, 0, 0, 0, 0, 5, 1)):
        server.do("poke", page + 8 * n, word)
    server.sys("mprotect", page, PAGE, 1)
    with pytest.raises(OSError) as caught:
        server.sys("ioctl", area.server_fd, uapi.UMEM_MARK_PAGE_CACHED, page)
    assert caught.value.errno == errno.EFAULT
    assert area.info().nr_cached == 0
    server.sys("mprotect", page, PAGE, 3)
    server.sys("ioctl", area.server_fd, uapi.UMEM_MARK_PAGE_CACHED, page)
    assert area.info().nr_cached == 1


@pytest.mark.parametrize(
    "members", [{"nr": 0}, {"nr": 1, "reserved": 1}, {"nr": 0, "reserved": 1}], ids=str
)
def test_get_refuses(area: Area, members: dict[str, int]) -> None:
    room = bytearray(1024)
    arg = uapi.PAGE_REQUESTS.pack(requests=0, nr=members["nr"])
    if "reserved" in members:
        arg[12] = 1
    with pytest.raises(OSError) as caught:
        fcntl.ioctl(area.server_fd, uapi.UMEM_GET_PAGE_REQUEST, arg)
    assert caught.value.errno == errno.EINVAL
    assert not any(room)


@pytest.mark.parametrize(
    "bad",
    [
        (64, 1),  # just behind the end
        (0, 65),
        (63, 2),
        (5, 0),  # empty
        (0, UINT64_MAX),
        (1, UINT64_MAX),  # the sum wraps to zero
        (63, UINT64_MAX - 62),
        (UINT64_MAX, 1),
        (UINT64_MAX, 2),
        (1 << 63, 1 << 63),
        (1 << 52, 1),  # times the page size it wraps
    ],
    ids=str,
)
def test_ranges_that_are_refused_mark_nothing(
    area: Area, agent: Agent, bad: tuple[int, int]
) -> None:
    """Nor do the good ranges around a bad one: all or none."""
    base = agent.map_node(area)
    (pending,) = agent.touch_all(base, [2])
    for ranges in ([bad], [(2, 1), bad], [bad, (2, 1)], [(0, 64), bad, (0, 1)]):
        marks = uapi.MarkBuffer()
        for pgoff, count in ranges:
            marks._words[2 * len(marks)] = pgoff  # not add(): that would join them
            marks._words[2 * len(marks) + 1] = count
            marks._used += 1
        with pytest.raises(DriverError) as caught:
            marks.flush(area.server_fd)
        assert caught.value.errno == errno.EINVAL
    assert area.info().nr_cached == 0
    assert not pending.done(0.05)
    area.mark([(0, 64)])
    assert area.info().complete
    assert pending.value() == 0


def test_mark_arguments_that_are_refused(area: Area) -> None:
    good = bytearray(struct.pack("=QQ", 0, 1) * (uapi.MARK_MAX + 1))
    address = uapi.array.array("Q", bytes(good))  # type: ignore[attr-defined]
    where = address.buffer_info()[0]
    for members, number in (
        ({"ranges": where, "nr": 0}, errno.EINVAL),
        ({"ranges": where, "nr": uapi.MARK_MAX + 1}, errno.EINVAL),
        ({"ranges": where, "nr": 0xFFFFFFFF}, errno.EINVAL),
        ({"ranges": where, "nr": 1, "flags": 2}, errno.EINVAL),
        ({"ranges": where, "nr": 1, "flags": 1 << 31}, errno.EINVAL),
        ({"ranges": 0, "nr": 1}, errno.EFAULT),
        ({"ranges": UINT64_MAX - 7, "nr": 1}, errno.EFAULT),
        ({"ranges": 1 << 47, "nr": uapi.MARK_MAX}, errno.EFAULT),
    ):
        values: dict[str, int | bytes] = dict(members)
        with pytest.raises(OSError) as caught:
            fcntl.ioctl(area.server_fd, uapi.UMEM_MARK_PAGE_CACHED, uapi.MARK_CACHED.pack(**values))
        assert caught.value.errno == number, members
    assert area.info().nr_cached == 0
    arg = uapi.MARK_CACHED.pack(ranges=where, nr=uapi.MARK_MAX)
    fcntl.ioctl(area.server_fd, uapi.UMEM_MARK_PAGE_CACHED, arg)
    assert uapi.MARK_CACHED.ints(arg)["nr_new"] == 1


def test_marks_count_what_is_new(new_area: Callable[[int], Area]) -> None:
    """Over word borders of any bitmap, overlapping, in any order."""
    area = new_area(1000)
    cached: set[int] = set()
    for pgoff, count in ((63, 2), (0, 1), (60, 10), (128, 64), (127, 66), (999, 1), (0, 1000)):
        new = set(range(pgoff, pgoff + count)) - cached
        assert area.mark([(pgoff, count)]) == len(new)
        cached |= new
        assert area.info().nr_cached == len(cached)
        assert area.info().complete == (len(cached) == 1000)
    assert area.mark([(0, 1000), (5, 5)]) == 0


def test_many_ranges_in_one_call(new_area: Callable[[int], Area]) -> None:
    area = new_area(2 * uapi.MARK_MAX + 100)
    assert area.mark((2 * n, 1) for n in range(uapi.MARK_MAX + 50)) == uapi.MARK_MAX + 50
    assert area.info().nr_cached == uapi.MARK_MAX + 50


def test_write_marks_like_the_ioctl(area: Area, agent: Agent) -> None:
    base = agent.map_node(area)
    pending = agent.touch_all(base, [50, 51])
    fill(area, 50, 2)
    assert os.write(area.server_fd, struct.pack("=4Q", 51, 50, 51, 20)) == 32
    assert [p.value() for p in pending] == [content(50), content(51)]
    assert area.info().nr_cached == 3
    for data in (b"1234567", bytes(9), struct.pack("=Q", 64), struct.pack("=Q", UINT64_MAX)):
        with pytest.raises(OSError) as caught:
            os.write(area.server_fd, data)
        assert caught.value.errno == errno.EINVAL
    assert os.write(area.server_fd, struct.pack("=3Q", 1, 64, 2)) == 8
    # More than any buffer on the stack takes at a time, the bad one last.
    assert os.write(area.server_fd, struct.pack("=101Q", *[3] * 100, 64)) == 800
    assert area.info().nr_cached == 5
    for size in (1, 7):
        area.set_blocking(False)
        with pytest.raises(OSError) as caught:
            os.readv(area.server_fd, [bytearray(size)])
        assert caught.value.errno == errno.EINVAL


def test_counts_of_the_info(area: Area, agent: Agent) -> None:
    base = agent.map_node(area)
    agent.touch_all(base, [1, 2])
    assert area.info().nr_delivered == 0
    take(area, 2)
    known = area.info()
    assert (known.nr_delivered, known.nr_cached, known.mapped) == (2, 0, True)


@pytest.mark.timeout(90)
def test_more_requests_at_once_than_any_queue_is_long(new_area: Callable[[int], Area]) -> None:
    """2000 threads on 2000 pages: each page is delivered before anything is marked."""
    area = new_area(2000)
    many = subprocess.Popen(
        [program("many"), area.node, str(area.npages)], stdout=subprocess.PIPE, text=True
    )
    try:
        seen: set[int] = set()
        area.set_blocking(False)
        deadline = time.monotonic() + 60 * SLOW
        while len(seen) < area.npages:
            assert time.monotonic() < deadline, f"{len(seen)} of {area.npages} requests came"
            time.sleep(0.05)  # let them gather, and the threads run
            while words := list(area.requests()):
                seen.update(words[::2])
        assert area.info().nr_cached == 0
        assert many.poll() is None
        fill(area, 0, area.npages)
        # Single pages, in an order that is none of the requests'.
        area.mark((n * 7 % area.npages, 1) for n in range(area.npages))
        assert many.wait(LONG) == 0
        assert many.stdout is not None
        assert many.stdout.read().split() == ["2000", "good,", "0", "bad"]
    finally:
        many.kill()
        many.communicate()


def test_thousands_of_waiters_can_be_killed(new_area: Callable[[int], Area]) -> None:
    area = new_area(1500)
    many = subprocess.Popen([program("many"), area.node, "1500"], stdout=subprocess.DEVNULL)
    try:
        wait_until(
            lambda: len(os.listdir(f"/proc/{many.pid}/task")) > 1500,  # noqa: PTH208
            "all threads started",
        )
        many.send_signal(signal.SIGTERM)  # its default is fatal too
        assert many.wait(LONG) == -signal.SIGTERM
    finally:
        many.kill()
        many.wait()
    wait_until(lambda: not area.info().mapped, "the mapping is gone")
