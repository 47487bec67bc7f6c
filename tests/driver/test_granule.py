# SPDX-License-Identifier: GPL-2.0-or-later
"""Granules that are larger than the page, and huge pages behind them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyumem import uapi
from pyumem.area import Area
from pyumem.errors import DriverError

from .support import (
    MADV_REMOVE,
    MAP_FIXED,
    MAP_SHARED,
    PAGE,
    SHORT,
    Agent,
    Server,
    content,
    fill,
    no_request,
    readable,
    serve,
    take,
    take_pages,
)
from .test_huge import map_aligned, shmem_huge

HUGE = uapi.GRANULE_MAX // PAGE
DISCARDED = uapi.UMEM_REQUEST_DISCARDED


@pytest.fixture(params=[2, 16, HUGE], ids=lambda pages: f"{pages * PAGE >> 10}K")
def pages(request: pytest.FixtureRequest) -> int:
    """Pages of a granule."""
    return int(request.param)


@pytest.fixture
def area(pages: int) -> Iterator[Area]:
    with Area.create("granules", 4 * pages * PAGE, granule_size=pages * PAGE) as made:
        yield made


@pytest.fixture
def base(area: Area, agent: Agent) -> int:
    return agent.map_node(area)


def test_a_touch_anywhere_asks_for_the_granule(
    area: Area, agent: Agent, base: int, pages: int
) -> None:
    last = 2 * pages + pages - 1
    pending = agent.touch_all(base, [last, 2 * pages])
    assert take(area, 1) == [(2 * pages, 0)]
    fill(area, 2 * pages, pages)
    assert area.mark([(2 * pages, pages)]) == 1
    assert [p.value() for p in pending] == [content(last), content(2 * pages)]
    assert agent.word(base, 2 * pages + 1) == content(2 * pages + 1)
    assert area.info().nr_cached == 1
    no_request(area, SHORT / 4)


def test_size_is_rounded_up_to_the_granule(pages: int) -> None:
    with Area.create("rounded", PAGE + 1, granule_size=pages * PAGE) as made:
        assert made.size == max(pages, 2) * PAGE
        assert made.granule_size == pages * PAGE


def test_complete_when_every_granule_is(area: Area, pages: int) -> None:
    assert area.mark([(0, 3 * pages)]) == 3
    assert not area.info().complete
    assert area.mark([(2 * pages, 2 * pages)]) == 1
    assert area.info().complete
    assert list(area.bitmap()) == [0b1111]


def test_parts_of_a_granule_cannot_be_marked(area: Area, pages: int) -> None:
    for pgoff, count in [(0, 1), (1, pages), (pages, pages + 1), (pages - 1, 1)]:
        with pytest.raises(DriverError) as caught:
            area.mark([(pgoff, count)])
        assert caught.value.errno == errno.EINVAL
    with pytest.raises(OSError) as refused:
        os.write(area.server_fd, (1).to_bytes(8, "little"))
    assert refused.value.errno == errno.EINVAL
    assert area.info().nr_cached == 0


def test_read_and_write_name_its_first_page(
    area: Area, agent: Agent, base: int, pages: int
) -> None:
    pending = agent.touch_all(base, [pages + 1])
    assert readable(area.server_fd, 10)
    assert os.read(area.server_fd, 80) == pages.to_bytes(8, "little")
    fill(area, pages, 3 * pages)
    offsets = b"".join((n * pages).to_bytes(8, "little") for n in (1, 2, 3))
    assert os.write(area.server_fd, offsets) == 24
    assert pending[0].value() == content(pages + 1)
    assert list(area.bitmap()) == [0b1110]


def test_a_granule_that_is_discarded_as_a_whole(
    area: Area, agent: Agent, base: int, pages: int
) -> None:
    agent.sys("madvise", base + pages * PAGE, pages * PAGE, MADV_REMOVE)
    ((pgoff, flags),) = take(area, 1)
    assert (pgoff, flags & DISCARDED) == (pages, DISCARDED)
    fill(area, pages, pages)  # it was on its way
    area.mark([(pages, pages)])
    assert agent.do("words", base + pages * PAGE, min(pages, 16), PAGE) == [0] * min(pages, 16)


def test_a_part_of_one_is_zero_when_it_comes(
    area: Area, agent: Agent, base: int, pages: int
) -> None:
    """The rest of it is still wanted, so nothing is asked for until somebody needs it."""
    agent.sys("madvise", base + PAGE, PAGE, MADV_REMOVE)
    no_request(area, SHORT / 2)
    pending = agent.touch_all(base, [1])
    ((pgoff, flags),) = take(area, 1)
    assert (pgoff, flags) == (0, 0)
    serve(area, 0, pages)
    assert pending[0].value() == 0
    assert agent.word(base, 0) == content(0)
    if pages > 2:
        assert agent.word(base, 2) == content(2)
    assert area.stats().nr_discarded == 1


def test_many_threads_on_one_granule(area: Area, agent: Agent, base: int, pages: int) -> None:
    places = [n % (4 * pages) for n in range(0, 32 * 7, 7)]
    with Server(area, lambda area, pgoff: fill(area, pgoff, pages)) as server:
        pending = [agent.touch(base, page, slot) for slot, page in enumerate(places, 1)]
        for page, p in zip(places, pending, strict=True):
            assert p.value() == content(page)
    assert len(set(server.served)) == len(server.served) == area.info().nr_cached


# --- huge pages ---


@pytest.fixture
def huge() -> Iterator[Area]:
    """Four huge pages."""
    size = 4 * uapi.GRANULE_MAX
    with Area.create("huge", size, granule_size=uapi.GRANULE_MAX, huge=True) as made:
        yield made


def test_one_fault_maps_one_huge_page(huge: Area, agent: Agent) -> None:
    assert huge.info().huge
    assert Path(f"/sys/class/umem/umem{huge.id}/huge").read_text() == "1\n"
    fd = agent.open(huge.node)
    base = map_aligned(agent, huge, fd)
    pending = agent.touch_all(base, [HUGE + 7])
    assert take_pages(huge, 1) == [HUGE]
    fill(huge, HUGE, HUGE)
    huge.mark([(HUGE, HUGE)])
    assert pending[0].value() == content(HUGE + 7)
    assert shmem_huge(agent, base) == uapi.GRANULE_MAX >> 10
    major = huge.stats().nr_major
    for page in (HUGE, HUGE + 300, 2 * HUGE - 1):
        assert agent.word(base, page) == content(page)
    assert huge.stats().nr_major == major == 1
    waiting = agent.touch_all(base, [3])  # the neighbour is missing, and stays so
    assert not waiting[0].done(SHORT)
    serve(huge, 0, HUGE)
    assert waiting[0].value() == content(3)


def test_the_kernel_chooses_an_aligned_place(huge: Area, agent: Agent) -> None:
    base = agent.map_node(huge)
    assert base % uapi.GRANULE_MAX == 0


def test_a_discard_within_a_huge_page(huge: Area, agent: Agent) -> None:
    base = agent.mmap(
        agent.open(huge.node),
        huge.npages,
        addr=agent.reserve(huge.npages, HUGE * PAGE),
        flags=MAP_SHARED | MAP_FIXED,
    )
    serve(huge, 0, HUGE)
    assert agent.word(base, 9) == content(9)
    agent.sys("madvise", base + 9 * PAGE, PAGE, MADV_REMOVE)
    assert agent.do("words", base + 8 * PAGE, 3, PAGE) == [content(8), 0, content(10)]


def test_areas_of_one_user_are_limited(new_agent: Callable[..., Agent]) -> None:
    """max_user_gib is for those without CAP_SYS_RESOURCE."""
    knob = Path("/sys/module/umem/parameters/max_user_gib")
    knob.write_text("1")
    Path(uapi.DEVICE).chmod(0o666)
    try:
        agent = new_agent(uid=1234)
        control = agent.open(uapi.DEVICE)
        half = uapi.CREATE.pack(size=1 << 29, name=b"half")
        agent.ioctl(control, uapi.UMEM_DEV_CREATE_UMEM, bytes(half))
        more = uapi.CREATE.pack(size=(1 << 29) + PAGE, name=b"more")
        with pytest.raises(OSError) as caught:
            agent.ioctl(control, uapi.UMEM_DEV_CREATE_UMEM, bytes(more))
        assert caught.value.errno == errno.EDQUOT
        other = uapi.CREATE.pack(size=1 << 29, name=b"other")
        agent.ioctl(control, uapi.UMEM_DEV_CREATE_UMEM, bytes(other))
        with Area.create("root.is.free", 4 << 30):
            pass
    finally:
        Path(uapi.DEVICE).chmod(0o660)
        knob.write_text("0")
