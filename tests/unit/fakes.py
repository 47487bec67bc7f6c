# SPDX-License-Identifier: GPL-2.0-or-later
"""An area without a driver, with the interface that the lanes use (pyumem.lanes.fill.AreaLike).

Faults are made by touch(); an eventfd stands for the server's descriptor, a memfd for the backing
file.  It holds the server to the driver's one rule: what was marked is never written again.
"""

from __future__ import annotations

import array
import errno
import gc
import mmap
import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from pyumem.errors import DriverError

PAGE = mmap.PAGESIZE
DISCARDED = 2


def open_descriptors() -> int:
    """How many this process has, without what other tests left to the garbage collector."""
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


class FakeArea:
    def __init__(self, name: str, npages: int, granule_pages: int = 1) -> None:
        self.name = name
        self.granule_pages = granule_pages
        self.npages = npages
        self.shmem_fd = os.memfd_create(name)
        os.ftruncate(self.shmem_fd, npages * PAGE)
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_SEMAPHORE)
        self.cached = bytearray(npages)
        self.no_memory = 0  # so many writes fail for want of it
        self.marks: list[tuple[int, int]] = []
        self.touched: list[tuple[int, int]] = []
        self._pending: list[tuple[int, int]] = []
        self.asked: set[int] = set()
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)

    # --- consumer ---

    def touch(self, pgoff: int, flags: int = 0) -> None:
        """Fault on a page, without waiting."""
        pgoff -= pgoff % self.granule_pages
        with self._lock:
            if not self.cached[pgoff]:
                self._pending.append((pgoff, flags))
                self.asked.add(pgoff)
                os.eventfd_write(self._event, 1)

    def wait_cached(self, pgoff: int, timeout: float = 10.0) -> None:
        """Sleep until a page is cached."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while not self.cached[pgoff]:
                left = deadline - time.monotonic()
                assert left > 0, f"page {pgoff} of {self.name} did not come"
                self._changed.wait(left)

    def wait_complete(self, timeout: float = 20.0) -> None:
        deadline = time.monotonic() + timeout
        with self._changed:
            while not all(self.cached):
                left = deadline - time.monotonic()
                missing = self.cached.count(0)
                assert left > 0, f"{missing} pages of {self.name} did not come"
                self._changed.wait(left)

    def page(self, pgoff: int) -> bytes:
        return os.pread(self.shmem_fd, PAGE, pgoff * PAGE)

    # --- server, as pyumem.area.Area ---

    def fileno(self) -> int:
        return self._event

    def write(self, pgoff: int, data: memoryview) -> None:
        count, rest = divmod(len(data), PAGE)
        assert pgoff >= 0 and count >= 1 and not rest and pgoff + count <= self.npages
        assert not any(self.cached[pgoff : pgoff + count]), "a cached page would be overwritten"
        if self.no_memory:
            self.no_memory -= 1
            raise DriverError("write", errno.ENOMEM, area=self.name, pages=(pgoff, count))
        assert os.pwrite(self.shmem_fd, data, pgoff * PAGE) == len(data)

    def requests(self) -> memoryview:
        with self._lock:
            taken, self._pending = self._pending, []
            for _ in taken:
                os.eventfd_read(self._event)
        return memoryview(array.array("Q", [word for one in taken for word in one]))

    def open_requests(self) -> list[int]:
        return sorted(page for page in self.asked if not self.cached[page])

    def mark(self, ranges: Iterable[tuple[int, int]], *, touch: bool = False) -> int:
        new = 0
        with self._changed:
            for pgoff, count in ranges:
                assert count >= 1 and pgoff + count <= self.npages
                assert not pgoff % self.granule_pages and not count % self.granule_pages
                self.marks.append((pgoff, count))
                if touch:
                    self.touched.append((pgoff, count))
                for page in range(pgoff, pgoff + count):
                    new += not self.cached[page]
                    self.cached[page] = 1
            self._changed.notify_all()
        return new

    def close(self) -> None:
        os.close(self.shmem_fd)
        os.close(self._event)
