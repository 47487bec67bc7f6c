# SPDX-License-Identifier: GPL-2.0-or-later
"""The interface of June 2012: UMEM_INIT on an open of /dev/umem, then mmap, read, write, poll."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import select
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyumem import uapi
from pyumem.errors import DriverError

from .support import (
    LONG,
    MAP_PRIVATE,
    MAP_SHARED,
    PAGE,
    Agent,
    areas,
    content,
    page_bytes,
    readable,
)

NPAGES = 8


@pytest.fixture
def dev() -> Iterator[int]:
    fd = uapi.open_control()
    yield fd
    os.close(fd)


@pytest.fixture
def shmem(dev: int) -> Iterator[int]:
    """The backing file; `dev` is an area of NPAGES then."""
    made = uapi.init(dev, NPAGES * PAGE)
    yield made.shmem_fd
    os.close(made.shmem_fd)


@contextlib.contextmanager
def fails(number: int) -> Iterator[None]:
    with pytest.raises(OSError) as caught:
        yield
    assert caught.value.errno == number


def words(data: bytes) -> list[int]:
    return list(memoryview(data).cast("Q"))


def offsets(*pages: int) -> bytes:
    return struct.pack(f"={len(pages)}Q", *pages)


def test_before_init_there_is_nothing(dev: int) -> None:
    with fails(errno.ENXIO):
        os.read(dev, 8)
    with fails(errno.ENXIO):
        os.write(dev, offsets(0))
    with fails(errno.ENXIO):
        mmap.mmap(dev, PAGE)
    assert readable(dev) == select.POLLERR
    for number, size in ((uapi.UMEM_GET_PAGE_REQUEST, 16), (uapi.UMEM_MARK_PAGE_CACHED, 24)):
        with fails(errno.ENXIO):
            fcntl.ioctl(dev, number, bytearray(size))
    with pytest.raises(DriverError) as caught:
        uapi.info(dev)
    assert caught.value.errno == errno.ENXIO


@pytest.mark.parametrize(
    ("asked", "given"), [(1, PAGE), (PAGE, PAGE), (PAGE + 1, 2 * PAGE), (3 * PAGE, 3 * PAGE)]
)
def test_size_is_rounded_up(dev: int, asked: int, given: int) -> None:
    made = uapi.init(dev, asked)
    assert made.size == given
    assert os.fstat(made.shmem_fd).st_size == given
    os.ftruncate(made.shmem_fd, given)  # what the programs of 2012 do
    for other in (0, given - 1, given + PAGE):
        with fails(errno.EPERM):
            os.ftruncate(made.shmem_fd, other)
    os.close(made.shmem_fd)


@pytest.mark.parametrize("size", [0, (1 << 64) - 1, (1 << 64) - PAGE + 1, 1 << 63])
def test_sizes_that_are_refused(dev: int, size: int) -> None:
    with pytest.raises(DriverError) as caught:
        uapi.init(dev, size)
    assert caught.value.errno == errno.EINVAL
    os.close(uapi.init(dev, PAGE).shmem_fd)  # the file is as good as before


def test_padding_is_ignored(dev: int) -> None:
    arg = uapi.INIT.pack(size=PAGE, padding=-1, shmem_fd=12345)
    fcntl.ioctl(dev, uapi.UMEM_INIT, arg)
    os.close(uapi.INIT.ints(arg)["shmem_fd"])


def test_once_only(dev: int, shmem: int) -> None:
    with pytest.raises(DriverError) as caught:
        uapi.init(dev, PAGE)
    assert caught.value.errno == errno.EBUSY
    assert os.fstat(shmem).st_size == NPAGES * PAGE


def test_it_is_an_unnamed_area_without_a_node(dev: int, shmem: int) -> None:
    (known,) = areas()
    assert known == uapi.info(dev)
    assert (known.name, known.size, known.server_pid) == ("", NPAGES * PAGE, os.getpid())
    assert known.served
    assert not known.has_node
    assert not Path(f"/dev/umem{known.id}").exists()
    assert os.fstat(shmem).st_size == known.size


@pytest.mark.usefixtures("shmem")
def test_two_of_them_do_not_clash() -> None:
    """They have no names, so none is taken twice."""
    with contextlib.closing(os.fdopen(uapi.open_control(), "rb", 0)) as other:
        os.close(uapi.init(other.fileno(), PAGE).shmem_fd)
        assert [known.name for known in areas()] == ["", ""]


@pytest.mark.usefixtures("shmem")
def test_reads_and_writes_that_are_refused(dev: int) -> None:
    for size in (1, 7):
        with fails(errno.EINVAL):
            os.read(dev, size)
    os.set_blocking(dev, False)
    with fails(errno.EAGAIN):
        os.read(dev, 8)
    for data in (b"1234567", bytes(12), offsets(NPAGES), offsets(1 << 63), offsets((1 << 64) - 1)):
        with fails(errno.EINVAL):
            os.write(dev, data)
    for flags in (MAP_SHARED, MAP_PRIVATE):
        for pgoff, count in ((0, NPAGES + 1), (NPAGES, 1), (1, NPAGES), (NPAGES + 7, 1)):
            with fails(errno.EINVAL):
                mmap.mmap(dev, count * PAGE, flags=flags, offset=pgoff * PAGE)
    assert not readable(dev)
    assert uapi.info(dev).nr_cached == 0


def test_the_flow_of_2012(dev: int, shmem: int, new_agent: Callable[..., Agent]) -> None:
    """open, UMEM_INIT, fork: one works on the mapping, the other serves until all is served."""
    worker = new_agent(pass_fds=[dev])
    backing = mmap.mmap(shmem, NPAGES * PAGE)
    base = worker.mmap(dev, NPAGES)
    # Up with a low bit first, so that order and repeats can be told apart.
    todo = [3, 0, 7, 3, 5, 1, 2, 4, 6]
    answers = [worker.touch(base, page, slot=1) for page in todo]  # one after the other
    left, seen = set(range(NPAGES)), []
    while left:
        assert readable(dev, LONG) & select.POLLIN
        for page in words(os.read(dev, 64)):
            seen.append(page)
            backing[page * PAGE : (page + 1) * PAGE] = page_bytes(page)
            assert os.write(dev, offsets(page)) == 8
            left.discard(page)
    assert [answer.value() for answer in answers] == [content(page) for page in todo]
    assert set(seen) == set(range(NPAGES))  # the same one may come again
    assert uapi.info(dev).complete
    backing.close()


def test_fork_shares_both_ends(dev: int, shmem: int, new_agent: Callable[..., Agent]) -> None:
    """Who forked afterwards serves the area just as well, and marks ahead of time."""
    parent = new_agent(pass_fds=[dev])
    base = parent.mmap(dev, NPAGES)
    pid = os.fork()
    if not pid:
        status = 1
        with contextlib.suppress(BaseException):
            (page,) = words(os.read(dev, 8))
            os.pwrite(shmem, page_bytes(page), page * PAGE)
            os.pwrite(shmem, page_bytes(6), 6 * PAGE)
            os.write(dev, offsets(page, 6))
            status = 0
        os._exit(status)
    assert parent.touch(base, 2, slot=1).value() == content(2)
    assert parent.word(base, 6) == content(6)
    assert os.waitpid(pid, 0) == (pid, 0)
    with fails(errno.EAGAIN):  # page 6 was never asked for
        os.set_blocking(dev, False)
        os.read(dev, 8)


def test_write_counts_what_is_before_the_first_bad_one(dev: int, shmem: int) -> None:
    assert os.write(dev, offsets(1, 2, NPAGES, 3)) == 16
    assert uapi.info(dev).nr_cached == 2
    assert os.write(dev, b"") == 0
    assert os.fstat(shmem).st_blocks == 0  # a mark allocates nothing


def test_shared_maps_share(dev: int, shmem: int, new_agent: Callable[..., Agent]) -> None:
    one, two = new_agent(pass_fds=[dev]), new_agent(pass_fds=[dev])
    a, b = one.mmap(dev, NPAGES), two.mmap(dev, 2, pgoff=4)
    os.write(dev, offsets(4))
    one.do("poke", a + 4 * PAGE, 77)
    assert two.word(b, 0) == 77
    assert os.pread(shmem, 8, 4 * PAGE) == offsets(77)


def test_private_maps_copy(dev: int, shmem: int, new_agent: Callable[..., Agent]) -> None:
    """A private map waits for a page like a shared one, and keeps what it writes to itself."""
    one, two = new_agent(pass_fds=[dev]), new_agent(pass_fds=[dev])
    a = one.mmap(dev, NPAGES, flags=MAP_PRIVATE)
    b = two.mmap(dev, NPAGES, flags=MAP_PRIVATE)
    reading = two.touch(b, 1, slot=1)
    assert words(os.read(dev, 8)) == [1]
    writing = one.start("poke", a + PAGE + 8, 99, slot=1)  # a write fault on the missing page
    assert not writing.done(0.1)
    os.pwrite(shmem, page_bytes(1), PAGE)
    os.write(dev, offsets(1))
    writing.values()
    assert reading.value() == content(1)
    assert one.do("words", a + PAGE, 3, 8) == [content(1), 99, content(1)]
    assert two.word(b + 8, 1) == content(1)
    assert os.pread(shmem, 8, PAGE + 8) == offsets(content(1))


def test_reattach_works_for_them_too(dev: int, shmem: int) -> None:
    """By number; the file that lost the area says so, but its mappings stay."""
    with contextlib.closing(os.fdopen(uapi.open_control(), "rb", 0)) as control:
        (known,) = areas()
        with pytest.raises(DriverError) as caught:
            uapi.reattach(control.fileno(), known.id)
        assert caught.value.errno == errno.EBUSY
        made = uapi.reattach(control.fileno(), known.id, force=True)
        assert os.fstat(made.shmem_fd).st_ino == os.fstat(shmem).st_ino
        with fails(errno.ENODEV):
            os.read(dev, 8)
        with fails(errno.ENODEV):
            os.write(dev, offsets(0))
        assert readable(dev) & (select.POLLERR | select.POLLHUP)
        mmap.mmap(dev, PAGE).close()
        os.close(made.server_fd)
        os.close(made.shmem_fd)


def test_the_area_goes_with_its_file(new_agent: Callable[..., Agent]) -> None:
    fd = uapi.open_control()
    made = uapi.init(fd, PAGE)
    agent = new_agent(pass_fds=[fd])
    base = agent.mmap(fd, 1)
    agent.sys("close", fd)
    os.close(made.shmem_fd)
    assert areas()[0].served
    os.close(fd)
    assert not areas()[0].served  # a mapping is left
    agent.sys("munmap", base, PAGE)
    assert areas() == []
