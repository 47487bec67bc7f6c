# SPDX-License-Identifier: GPL-2.0-or-later
"""The log of what consumers write: whoever writes by whatever means is in it, and nobody else."""

from __future__ import annotations

import array
import ctypes
import errno
import mmap
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from pyumem import uapi
from pyumem.area import Area
from pyumem.errors import DriverError

from .build import program
from .support import (
    MADV_DONTNEED,
    MADV_PAGEOUT,
    MADV_REMOVE,
    MREMAP_FIXED,
    MREMAP_MAYMOVE,
    PAGE,
    PROT_READ,
    RW,
    SLOW,
    Agent,
    content,
    serve,
    take_pages,
    wait_until,
)

pytest_plugins = ["tests.driver.test_swap", "tests.driver.test_access"]

NPAGES = 64
SYS_MBIND, MPOL_MF_MOVE = 237, 2  # which empties the lists of pages that wait


def bits(words: array.array[int]) -> list[int]:
    return [64 * n + bit for n, word in enumerate(words) for bit in range(64) if word >> bit & 1]


def settle() -> None:
    """Have pages that were just made or written get to their places on the kernel's lists.

    They wait for it held, and what is held is taken for written.
    """
    page = mmap.mmap(-1, PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.syscall(SYS_MBIND, ctypes.c_long(address), PAGE, 0, None, 0, MPOL_MF_MOVE) == 0


def dirty(area: Area) -> list[int]:
    """Read the log and clear it: pages, of an area with granules of a page."""
    settle()
    words, nr = area.dirty()
    found = bits(words)
    assert len(found) == nr
    return found


def start(area: Area) -> None:
    """Switch it on, with an empty log."""
    settle()
    area.set_dirty_log(True)
    dirty(area)


@pytest.fixture
def whole(area: Area) -> Area:
    """An area of 64 pages, all of them there."""
    serve(area, 0, NPAGES)
    return area


@pytest.fixture
def base(whole: Area, agent: Agent) -> int:
    """The agent has it mapped, and has written to all of it."""
    base = agent.map_node(whole)
    for page in range(NPAGES):
        agent.do("poke", base + page * PAGE, page)
    start(whole)
    assert dirty(whole) == []
    return base


def test_reading_is_no_writing(whole: Area, agent: Agent, base: int) -> None:
    for page in range(NPAGES):
        assert agent.word(base, page) == page
    assert dirty(whole) == []


def test_each_write_is_in_one_round(whole: Area, agent: Agent, base: int) -> None:
    agent.do("poke", base + 3 * PAGE, 1)
    agent.do("poke", base + 3 * PAGE, 2)
    agent.do("poke", base + 63 * PAGE, 1)
    assert dirty(whole) == [3, 63]
    assert dirty(whole) == []
    agent.do("poke", base + 3 * PAGE, 3)
    assert dirty(whole) == [3]
    assert agent.word(base, 3) == 3


def test_pages_between_those_that_were_written(whole: Area, agent: Agent, base: int) -> None:
    """Their entries are taken away along with those of their neighbours, and that is all."""
    for distance in (1, 2, 8, 9, 10, 11, 31):
        pages = [*range(1, NPAGES, distance)]
        for page in pages:
            agent.do("poke", base + page * PAGE, page + 100)
        assert dirty(whole) == pages, distance
        assert dirty(whole) == [], distance
    for page in (5, 13):
        agent.do("poke", base + page * PAGE, 1)
    assert dirty(whole) == [5, 13]
    agent.do("poke", base + 9 * PAGE, 2)
    assert agent.word(base, 7) == 107
    assert dirty(whole) == [9], "who writes between them comes by, too"


def test_looking_clears_nothing(whole: Area, agent: Agent, base: int) -> None:
    agent.do("poke", base + 3 * PAGE, 1)
    for _ in range(2):
        words, nr = whole.dirty(clear=False)
        assert (bits(words), nr) == ([3], 1)
    assert dirty(whole) == [3]


def test_a_part_of_it(new_area: Callable[[int], Area], agent: Agent) -> None:
    area = new_area(300)
    serve(area, 0, 300)
    base = agent.map_node(area)
    start(area)
    for page in (0, 63, 64, 127, 128, 299):
        agent.do("poke", base + page * PAGE, 1)
    buffer = uapi.DirtyBuffer(300)
    assert buffer.read(area.server_fd, first=64, nr=64) == 2
    assert bits(buffer.words) == [64, 127]
    assert dirty(area) == [0, 63, 128, 299]


def test_the_kernel_writes(whole: Area, agent: Agent, new_agent: Callable[..., Agent]) -> None:
    """read() into it, and another process's process_vm_writev() and ptrace()."""
    base = agent.map_node(whole)
    start(whole)
    (pipe,) = agent.do("alloc", PAGE)
    agent.sys("pipe", pipe)
    (ends,) = agent.do("words", pipe, 1, 8)
    agent.sys("write", ends >> 32, pipe, 8)
    agent.sys("read", ends & 0xFFFFFFFF, base + 5 * PAGE, 8)
    assert dirty(whole) == [5]

    other = new_agent()
    (local,) = other.do("alloc", PAGE)
    for at, word in enumerate((local + 64, 8, base + 9 * PAGE, 8)):
        other.do("poke", local + 8 * at, word)
    assert other.sys("process_vm_writev", agent.pid, local, 1, local + 16, 1, 0) == 8
    assert dirty(whole) == [9]

    Path(f"/proc/{agent.pid}/mem").open("r+b", buffering=0).close()
    with Path(f"/proc/{agent.pid}/mem").open("r+b", buffering=0) as memory:
        memory.seek(base + 11 * PAGE)
        memory.write(b"x")
    assert dirty(whole) == [11]


def test_every_mapping_of_everybody(
    whole: Area, agent: Agent, new_agent: Callable[..., Agent]
) -> None:
    other = new_agent()
    bases = [(agent, agent.map_node(whole)), (agent, agent.map_node(whole))]
    bases.append((other, other.map_node(whole)))
    start(whole)
    bases.append((other, other.map_node(whole)))  # and one made while it is on
    for round in range(2):
        for n, (who, base) in enumerate(bases):
            who.do("poke", base + n * PAGE, round)
        assert dirty(whole) == [0, 1, 2, 3]
    # The same page by two mappings: both come again.
    agent.do("poke", bases[0][1] + 20 * PAGE, 1)
    other.do("poke", bases[2][1] + 20 * PAGE, 1)
    assert dirty(whole) == [20]
    other.do("poke", bases[2][1] + 20 * PAGE, 2)
    assert dirty(whole) == [20]
    agent.do("poke", bases[0][1] + 20 * PAGE, 2)
    assert dirty(whole) == [20]


def test_a_mapping_that_moves(whole: Area, agent: Agent, base: int) -> None:
    agent.do("poke", base + 7 * PAGE, 1)
    room = agent.reserve(NPAGES)
    moved = agent.sys(
        "mremap", base, NPAGES * PAGE, NPAGES * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, room
    )
    assert dirty(whole) == [7]
    agent.do("poke", moved + 7 * PAGE, 2)
    assert dirty(whole) == [7]


def test_mprotect_gives_no_way_round(whole: Area, agent: Agent, base: int) -> None:
    agent.do("poke", base + 7 * PAGE, 1)
    assert dirty(whole) == [7]
    for prot in (PROT_READ, RW):
        agent.sys("mprotect", base, NPAGES * PAGE, prot)
    agent.do("poke", base + 7 * PAGE, 2)
    agent.do("poke", base + 8 * PAGE, 2)
    assert dirty(whole) == [7, 8]


def test_page_tables_that_were_dropped(whole: Area, agent: Agent, base: int) -> None:
    agent.do("poke", base + 7 * PAGE, 1)
    agent.sys("madvise", base, NPAGES * PAGE, MADV_DONTNEED)
    assert dirty(whole) == [7], "what was written stays written"
    agent.do("poke", base + 8 * PAGE, 1)
    assert dirty(whole) == [8]


@pytest.mark.usefixtures("swap")
def test_a_page_in_swap(whole: Area, agent: Agent, base: int) -> None:
    agent.do("poke", base + 7 * PAGE, 4711)
    whole.map.madvise(mmap.MADV_DONTNEED)
    agent.sys("madvise", base, NPAGES * PAGE, MADV_PAGEOUT)
    assert dirty(whole) == [7]
    assert agent.word(base, 7) == 4711
    assert dirty(whole) == []
    agent.do("poke", base + 9 * PAGE, 1)
    agent.sys("madvise", base, NPAGES * PAGE, MADV_PAGEOUT)
    agent.do("poke", base + 7 * PAGE, 1)
    assert dirty(whole) == [7, 9]


def test_a_discarded_page_is_written(whole: Area, agent: Agent, base: int) -> None:
    agent.sys("madvise", base + 7 * PAGE, 2 * PAGE, MADV_REMOVE)
    assert dirty(whole) == [7, 8]
    assert agent.word(base, 7) == 0
    assert dirty(whole) == []


def test_a_mapping_that_was_made_plain(whole: Area, agent: Agent) -> None:
    base = agent.map_node(whole)
    whole.make_anonymous()
    plain = agent.map_node(whole)
    agent.do("poke", base, 1)
    agent.do("poke", plain + PAGE, 1)
    start(whole)
    agent.do("poke", base, 2)
    agent.do("poke", plain + PAGE, 2)
    assert dirty(whole) == [0, 1]
    with pytest.raises(DriverError) as busy:
        whole.make_anonymous()
    assert busy.value.errno == errno.EBUSY
    whole.set_dirty_log(False)
    assert not whole.info().mapped, "they are plain again"
    agent.do("poke", base, 3)
    assert agent.word(plain, 0) == 3


def test_missing_pages_may_be_logged_too(area: Area, agent: Agent) -> None:
    """What the server fills in is no write; what the consumer makes of it is."""
    serve(area, 0, 8)
    base = agent.map_node(area)
    start(area)
    pending = agent.start("poke", base + 20 * PAGE, 1, slot=1)
    assert take_pages(area, 1) == [20]
    serve(area, 20)
    pending.values()
    serve(area, 21)
    assert agent.word(base, 21) == content(21)
    assert dirty(area) == [20]


def test_off_and_on(whole: Area, agent: Agent, base: int) -> None:
    agent.do("poke", base, 1)
    whole.set_dirty_log(False)
    with pytest.raises(DriverError) as off:
        whole.dirty()
    assert off.value.errno == errno.ENODATA
    whole.set_dirty_log(False)
    agent.do("poke", base + PAGE, 1)
    whole.set_dirty_log(True)
    assert dirty(whole) == []
    agent.do("poke", base + 2 * PAGE, 1)
    assert dirty(whole) == [2]
    with pytest.raises(DriverError) as on:
        uapi.set_dirty_log(whole.server_fd, True)
    assert on.value.errno == errno.EBUSY


def test_it_ends_with_the_server(whole: Area, agent: Agent, base: int) -> None:
    agent.open(whole.node)
    whole.close()
    agent.do("poke", base + PAGE, 1)
    with Area.reattach(whole.id) as again:
        assert not again.info().mapped
        with pytest.raises(DriverError) as off:
            again.dirty()
        assert off.value.errno == errno.ENODATA


def test_a_forced_successor_goes_on_with_it(whole: Area, agent: Agent, base: int) -> None:
    agent.do("poke", base + PAGE, 1)
    with Area.reattach(whole.id, force=True) as again:
        whole.close()
        assert dirty(again) == [1]
        agent.do("poke", base + PAGE, 2)
        assert dirty(again) == [1]


@pytest.mark.parametrize("order", [1, 4, 9])
def test_granules(order: int, agent: Agent) -> None:
    step = 1 << order
    with Area.create("dirty.granules", 8 * step * PAGE, granule_size=step * PAGE) as area:
        serve(area, 0, 8 * step)
        base = agent.map_node(area)
        start(area)
        agent.do("poke", base + 3 * step * PAGE, 1)
        agent.do("poke", base + (8 * step - 1) * PAGE, 1)
        assert dirty(area) == [3, 7]
        agent.do("poke", base + (3 * step + 1) * PAGE, 1)
        assert dirty(area) == [3]


def test_huge_pages(agent: Agent) -> None:
    huge = 2 << 20
    with Area.create("dirty.huge", 4 * huge, granule_size=huge, huge=True) as area:
        serve(area, 0, 4 * huge // PAGE)
        base = agent.mmap(
            agent.open(area.node), area.npages, addr=agent.reserve(area.npages, huge), flags=1 | 16
        )
        start(area)
        for _ in range(2):
            agent.word(base, 0)
            agent.do("poke", base + huge + 5 * PAGE, 1)
            assert dirty(area) == [1]


def test_io_that_is_under_way_is_read_again(whole: Area, agent: Agent, base: int) -> None:
    """Whoever holds a page without an entry may write to it at any time."""
    (ends_at,) = agent.do("alloc", PAGE)
    agent.sys("pipe", ends_at)
    (ends,) = agent.do("words", ends_at, 1, 8)
    (vector,) = agent.do("alloc", PAGE)
    agent.do("poke", vector, base + 7 * PAGE)
    agent.do("poke", vector + 8, PAGE)
    # The pipe holds the page itself.
    agent.sys("vmsplice", ends >> 32, vector, 1, 0)
    agent.do("poke", base + 7 * PAGE, 1)
    for _ in range(3):
        assert dirty(whole) == [7]
    for end in (ends >> 32, ends & 0xFFFFFFFF):
        agent.sys("close", end)
    assert dirty(whole) == [7]
    assert dirty(whole) == []


def test_io_that_began_before_the_log(whole: Area, agent: Agent) -> None:
    """Its page is in every reading from the first one on, though nobody writes by an entry."""
    base = agent.map_node(whole)
    (room,) = agent.do("alloc", PAGE)
    agent.sys("pipe", room)
    (ends,) = agent.do("words", room, 1, 8)
    agent.do("poke", base + 7 * PAGE, 1)
    agent.do("poke", room + 64, base + 7 * PAGE)
    agent.do("poke", room + 72, PAGE)
    agent.sys("vmsplice", ends >> 32, room + 64, 1, 0)
    start(whole)
    for _ in range(2):
        assert dirty(whole) == [7]
    for end in (ends >> 32, ends & 0xFFFFFFFF):
        agent.sys("close", end)
    assert dirty(whole) == [7]
    assert dirty(whole) == []


def test_mappings_are_made_while_it_is_switched(
    whole: Area, agent: Agent, new_agent: Callable[..., Agent]
) -> None:
    """None slips in: not logged while it is on, nor logged when it is off again."""
    agents = [agent, new_agent(), new_agent()]
    fds = [each.open(whole.node) for each in agents]
    for round in range(20):
        pending = [
            each.start("sys", "mmap", 0, NPAGES * PAGE, RW, mmap.MAP_SHARED, fd, 0, slot=1)
            for each, fd in zip(agents, fds, strict=True)
        ]
        whole.set_dirty_log(True)
        bases = [each.value() for each in pending]
        dirty(whole)
        dirty(whole)
        for n, (each, base) in enumerate(zip(agents, bases, strict=True)):
            each.do("poke", base + n * PAGE, round)
            # Gone before the reading, with its entry.
            each.sys("munmap", base, NPAGES * PAGE)
        assert dirty(whole) == [0, 1, 2]
        whole.set_dirty_log(False)
    assert not whole.info().mapped


def test_a_fenced_server_reads_nothing(whole: Area, agent: Agent, base: int) -> None:
    agent.do("poke", base + PAGE, 1)
    with Area.reattach(whole.id, force=True) as again:
        for call in (whole.dirty, lambda: uapi.set_dirty_log(whole.server_fd, False)):
            with pytest.raises(DriverError) as fenced:
                call()
            assert fenced.value.errno == errno.ENODEV
        assert dirty(again) == [1]


def starts(*argv: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(word) for word in argv], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def says(process: subprocess.Popen[str], order: str = "") -> str:
    """Give it a line, if any, and return its next one."""
    assert process.stdin is not None
    assert process.stdout is not None
    if order:
        process.stdin.write(order + "\n")
        process.stdin.flush()
    return process.stdout.readline().strip()


@pytest.mark.parametrize("kind", ["irqchip", "plain"])
def test_a_virtual_machine_writes(whole: Area, kind: str) -> None:
    """What it wrote in a round is in that round's log, and nothing else."""
    choice = random.Random(kind)
    with starts(program("kvm_touch"), whole.node, NPAGES, kind, "write") as vm:
        assert says(vm) == "running"
        assert says(vm, "5 1") == "5 written"
        start(whole)
        for round in range(1, 30):
            pages = choice.sample(range(NPAGES), choice.randrange(12))
            for page in pages:
                assert says(vm, f"{page} {round}") == f"{page} written"
            assert dirty(whole) == sorted(pages)
            for page in pages:
                assert whole.map[page * PAGE + 2] == round
        whole.set_dirty_log(False)
        assert says(vm, "7 1") == "7 written"
        assert vm.stdin is not None
        vm.stdin.close()
        assert vm.wait(60) == 0


@pytest.mark.usefixtures("vhost_net")
def test_vhost_writes(whole: Area) -> None:
    """The second page of its rings is written by its thread alone."""

    def told(sent: int) -> bool:
        return whole.map[21 * PAGE + 2] == sent

    with starts(program("vhost"), whole.node, 7, 20) as vhost:
        assert says(vhost) == "goes"
        frame = says(vhost)
        start(whole)
        for sent in range(2, 5):
            assert says(vhost, "again") == frame
            wait_until(partial(told, sent), "it is told as sent")
            assert dirty(whole) == [20, 21]
        vhost.kill()


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"first": 1, "nr_words": 1}, errno.EINVAL),
        ({"first": 64, "nr_words": 1}, errno.EINVAL),
        ({"first": 128, "nr_words": 0}, errno.EINVAL),
        ({"first": (1 << 64) - 64, "nr_words": 1}, errno.EINVAL),
        ({"nr_words": 2}, errno.EINVAL),
        ({"nr_words": 0xFFFFFFFF}, errno.EINVAL),
        ({"nr_words": 1, "flags": 2}, errno.EINVAL),
        ({"nr_words": 1, "words": 8}, errno.EFAULT),
    ],
)
def test_bad_arguments(
    whole: Area, agent: Agent, base: int, values: dict[str, int], error: int
) -> None:
    agent.do("poke", base + 5 * PAGE, 1)
    with pytest.raises(OSError) as raised:
        uapi._call(whole.server_fd, uapi.UMEM_GET_DIRTY, uapi.DIRTY.pack(**values))
    assert raised.value.errno == error
    assert dirty(whole) == [5], "what was not told is not lost"
    for on in (2, 0xFFFFFFFF):
        with pytest.raises(OSError) as raised:
            uapi._call(whole.server_fd, uapi.UMEM_SET_DIRTY_LOG, uapi.DIRTY_LOG.pack(on=on))
        assert raised.value.errno == errno.EINVAL


@pytest.fixture
def noise(ram_disk: Path) -> Iterator[Path]:
    """A block device of random bytes, for O_DIRECT."""
    with ram_disk.open("r+b") as disk:
        disk.write(os.urandom(64 * PAGE))
    yield ram_disk


@pytest.mark.timeout(1200)
def test_no_write_is_missed(noise: Path) -> None:
    """Everybody writes at once, as they like; see progs/dirty.c."""
    seconds = int(os.environ.get("UMEM_STRESS_SECONDS", 8 * SLOW))
    seed = os.environ.get("UMEM_STRESS_SEED") or str(random.randrange(1 << 32))
    print(f"dirty {seconds} {seed}")
    done = subprocess.run(
        [program("dirty"), str(seconds), seed, noise],
        capture_output=True,
        text=True,
        timeout=seconds + 300,
        check=False,
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"
