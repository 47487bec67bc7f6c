# SPDX-License-Identifier: GPL-2.0-or-later
"""Pages of an area go to swap like other shared memory, and come back without the server."""

from __future__ import annotations

import mmap
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyumem.area import Area

from .support import (
    MADV_PAGEOUT,
    PAGE,
    Agent,
    content,
    no_request,
    serve,
    take_pages,
    wait_until,
)


@pytest.fixture
def swap(ram_disk: Path) -> Iterator[None]:
    subprocess.run(["mkswap", ram_disk], check=True, capture_output=True)
    subprocess.run(["swapon", ram_disk], check=True)
    yield
    subprocess.run(["swapoff", ram_disk], check=True)


def swapped(agent: Agent, base: int) -> int:
    """KiB of the mapping that are in swap."""
    inside = False
    for line in Path(f"/proc/{agent.pid}/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head:
            inside = int(head.split("-")[0], 16) == base
        elif inside and head == "Swap:":
            return int(line.split()[1])
    raise AssertionError("no such mapping")


@pytest.mark.usefixtures("swap")
def test_swapped_out_and_faulted_in_again(new_area: Callable[[int], Area], agent: Agent) -> None:
    area = new_area(1024)
    base = agent.map_node(area)
    serve(area, 0, 512)
    agent.do("poke", base + 7 * PAGE + 8, 77)
    for page in range(0, 512, 8):
        agent.word(base, page)

    def page_out() -> bool:
        # Pages that others map too are passed over: the server lets go of them.
        area.map.madvise(mmap.MADV_DONTNEED)
        agent.do("words", base, 512, PAGE)
        agent.sys("madvise", base, area.size, MADV_PAGEOUT)
        return swapped(agent, base) > 512 * PAGE // 1024 // 2

    wait_until(page_out, "half of the cached pages are in swap")
    assert area.info().nr_cached == 512  # cached is not the same as in memory
    got = agent.do("words", base, 512, PAGE)
    assert got == [content(page) for page in range(512)]
    assert agent.do("words", base + 7 * PAGE, 2, 8) == [content(7), 77]
    no_request(area)
    pending = agent.touch(base, 600, slot=1)
    assert take_pages(area, 1) == [600]
    serve(area, 600)
    assert pending.value() == content(600)


@pytest.mark.usefixtures("swap")
def test_swapped_out_before_anybody_mapped_it(
    new_area: Callable[[int], Area], new_agent: Callable[..., Agent]
) -> None:
    """What the server filled goes to swap from its own mapping; the consumer faults it in."""
    area = new_area(512)
    server, consumer = new_agent(pass_fds=[area.shmem_fd]), new_agent()
    backing = server.mmap(area.shmem_fd, 512)
    for page in range(0, 256, 4):
        server.do("fill", backing + page * PAGE, 512, content(page))

    def page_out() -> bool:
        server.sys("madvise", backing, area.size, MADV_PAGEOUT)
        return swapped(server, backing) > 100

    wait_until(page_out, "the filled pages are in swap")
    area.mark([(0, 256)])
    base = consumer.map_node(area)
    expected = [0 if page % 4 else content(page) for page in range(256)]
    assert consumer.do("words", base, 256, PAGE) == expected
    no_request(area, within=0.02)
