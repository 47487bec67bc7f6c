# SPDX-License-Identifier: GPL-2.0-or-later
"""What area.py does without a driver: ownership of descriptors and mapping, batching of marks,
bounds.
"""

from __future__ import annotations

import array
import errno
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pyumem import uapi
from pyumem.area import Area, node_path
from pyumem.errors import DriverError
from pyumem.uapi import PAGE_SIZE

NPAGES = 8


@pytest.fixture
def created(tmp_path: Path) -> Iterator[uapi.Created]:
    server = os.open(tmp_path / "server", os.O_RDWR | os.O_CREAT)
    shmem = os.memfd_create("backing")
    os.ftruncate(shmem, NPAGES * PAGE_SIZE)
    yield uapi.Created(7, NPAGES * PAGE_SIZE, PAGE_SIZE, server, shmem)
    for fd in (server, shmem):
        try:
            os.close(fd)
        except OSError as e:
            assert e.errno == errno.EBADF


def is_open(fd: int) -> bool:
    return Path(f"/proc/self/fd/{fd}").exists()


def test_views_reach_the_backing_file(created: uapi.Created) -> None:
    with Area(created, "vm.ram0") as area:
        assert (area.node, area.npages, area.fileno()) == ("/dev/umem7", NPAGES, created.server_fd)
        with area.view(2, 3) as view:
            assert len(view) == 3 * PAGE_SIZE
            view[:4] = b"page"
        assert os.pread(created.shmem_fd, 4, 2 * PAGE_SIZE) == b"page"
        for pgoff, count in ((-1, 1), (0, 0), (0, NPAGES + 1), (NPAGES, 1), (1 << 60, 1)):
            with pytest.raises(ValueError, match=r"vm\.ram0"):
                area.view(pgoff, count)
    assert not is_open(created.server_fd)
    assert not is_open(created.shmem_fd)


@pytest.mark.parametrize("step", [1, 2, 16, 64, 512])
def test_of_a_granule_all_pages_are_cached(
    created: uapi.Created, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    nr = 70
    here = {0, 3, 63, 69}
    words = array.array("Q", [sum(1 << bit % 64 for bit in here if bit // 64 == w) for w in (0, 1)])
    monkeypatch.setattr(uapi, "bitmap", lambda *_, **__: words)
    granule = step * PAGE_SIZE
    with Area(replace(created, size=nr * granule, granule_size=granule), "vm.ram0") as area:
        pages = area.page_bitmap()
        found = {64 * at + bit for at, w in enumerate(pages) for bit in range(64) if w >> bit & 1}
        assert found == {granule * step + n for granule in here for n in range(step)}
        assert len(pages) == -(-nr * step // 64)


def test_writes_reach_the_backing_file(created: uapi.Created) -> None:
    data = memoryview(bytes([7]) * 2 * PAGE_SIZE)
    with Area(created, "vm.ram0") as area:
        area.write(NPAGES - 2, data)
        assert os.pread(created.shmem_fd, len(data), (NPAGES - 2) * PAGE_SIZE) == data
        for pgoff, part in ((-1, data), (NPAGES - 1, data), (0, data[:0])):
            with pytest.raises(ValueError, match=r"vm\.ram0"):
                area.write(pgoff, part)


def test_a_write_without_memory_says_where(
    created: uapi.Created, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    with Area(created, "vm.ram0") as area:
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(DriverError, match=r"vm\.ram0: write, pages 1\.\.2: ") as caught:
            area.write(1, memoryview(bytes(2 * PAGE_SIZE)))
        assert caught.value.errno == errno.ENOMEM


def test_close_twice_is_harmless(created: uapi.Created) -> None:
    area = Area(created, "a")
    area.close()
    reused = os.open("/dev/null", os.O_RDONLY)  # takes one of the two numbers
    area.close()
    assert is_open(reused)
    os.close(reused)


def test_close_with_a_view_held_leaks_no_descriptor(created: uapi.Created) -> None:
    area = Area(created, "a")
    view = area.view(0, 1)
    with pytest.raises(BufferError):
        area.close()
    assert not is_open(created.server_fd)
    view.release()
    area.close()


def test_a_failure_is_not_hidden_by_a_held_view(created: uapi.Created) -> None:
    with pytest.raises(ZeroDivisionError), Area(created, "a") as area:
        view = area.view(0, 1)
        _ = len(view) // 0


def test_mark_batches(created: uapi.Created, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []

    def flush(self: uapi.MarkBuffer, _fd: int, **_flags: bool) -> int:
        batches.append(len(self))
        self.clear()
        return batches[-1]

    monkeypatch.setattr(uapi.MarkBuffer, "flush", flush)
    with Area(created, "a") as area:
        # Every other page, so that none can be joined.
        nr = area.mark((2 * n, 1) for n in range(uapi.MARK_MAX + 10))
    assert batches == [uapi.MARK_MAX, 10]
    assert nr == uapi.MARK_MAX + 10


def test_from_fds_closes_what_is_no_area(created: uapi.Created) -> None:
    with pytest.raises(DriverError):
        Area.from_fds(created.server_fd, created.shmem_fd)
    assert not is_open(created.server_fd)
    assert not is_open(created.shmem_fd)


def test_node_path() -> None:
    assert node_path(12) == "/dev/umem12"
