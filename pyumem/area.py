# SPDX-License-Identifier: GPL-2.0-or-later
"""One area as its server sees it: the descriptors, the mapping of the backing file, requests and
marks.

An Area owns its two descriptors and its mapping and frees them together.  It never decides what to
fetch or when.
"""

from __future__ import annotations

import array
import contextlib
import errno
import mmap
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self, TypeVar

from pyumem import uapi
from pyumem.errors import DriverError
from pyumem.uapi import PAGE_SIZE, AreaInfo, AreaStats, Created, MarkBuffer, RequestBuffer

_ALL: Final = (1 << 64) - 1
_T = TypeVar("_T")
_AGAIN: Final = 100
_AGAIN_S: Final = 0.01

REQUESTS_AT_ONCE: Final = 256
"""Requests that one call of Area.requests() takes at most."""


def node_path(area_id: int) -> str:
    """Return the path of an area's node."""
    return f"/dev/umem{area_id}"


def _try_again(call: Callable[[], _T]) -> _T:
    """Do what fails with EAGAIN while some process forks, or maps the area."""
    for _ in range(_AGAIN):
        try:
            return call()
        except DriverError as e:
            if e.errno != errno.EAGAIN:
                raise
        time.sleep(_AGAIN_S)
    return call()


@dataclass(frozen=True, slots=True)
class Granule:
    """What an area is made of.  size is bytes, 0 for the host page; huge: each is a huge page."""

    size: int = 0
    huge: bool = False


HOST_PAGE: Final = Granule()


class Area:
    """The server's end of an area.  A context manager; close() it otherwise.

    size and granule_size are bytes, npages host pages.
    """

    def __init__(
        self, created: Created, name: str, *, requests_at_once: int = REQUESTS_AT_ONCE
    ) -> None:
        """Own the descriptors of `created` from now on.  Use create(), reattach() or from_fds()."""
        self.id: Final = created.id
        self.name: Final = name
        self.size: Final = created.size
        self.granule_size: Final = created.granule_size
        self.npages: Final = created.size // PAGE_SIZE
        self.granule_pages: Final = max(1, created.granule_size // PAGE_SIZE)
        self.server_fd = created.server_fd
        self.shmem_fd = created.shmem_fd
        self._map: mmap.mmap | None = None
        self._view: memoryview | None = None
        self._dirty: uapi.DirtyBuffer | None = None
        self._requests = RequestBuffer(requests_at_once, area=name)
        self._marks = MarkBuffer(area=name)

    # --- making one ---

    @classmethod
    def create(
        cls,
        name: str,
        size: int,
        *,
        granule_size: int = 0,
        huge: bool = False,
        loss_timeout_ms: int = 0,
    ) -> Self:
        """Create a named area of size bytes (rounded up to the granule), all of it missing.

        granule_size is bytes, 0 for the host page; huge backs it with huge pages;
        loss_timeout_ms as in set_loss_policy().  Raises DriverError.
        """
        control = uapi.open_control()
        try:
            created = uapi.create(
                control,
                name,
                size,
                granule_size=granule_size,
                flags=uapi.UMEM_CREATE_HUGE if huge else 0,
                loss_timeout_ms=loss_timeout_ms,
            )
            return cls(created, name)
        finally:
            os.close(control)

    @classmethod
    def reattach(cls, area_id: int, *, force: bool = False) -> Self:
        """Take over an area whose server died, or with force one whose server hangs.  Raises
        DriverError.
        """
        control = uapi.open_control()
        try:
            created = uapi.reattach(control, area_id, force)
        finally:
            os.close(control)
        return cls._named(created)

    @staticmethod
    def look(area_id: int) -> AreaInfo:
        """Return what the driver knows of an area that need not be served.  Raises DriverError."""
        control = uapi.open_control()
        try:
            return uapi.area_info(control, area_id)
        finally:
            os.close(control)

    @classmethod
    def from_fds(cls, server_fd: int, shmem_fd: int) -> Self:
        """Make an Area of descriptors that another process created and handed over; they are owned
        from now on.

        Of an error the descriptors are closed.  Raises DriverError.
        """
        return cls._named(Created(-1, 0, 0, server_fd, shmem_fd))

    @classmethod
    def _named(cls, created: Created) -> Self:
        """Fill in what only the driver knows."""
        try:
            known = uapi.info(
                created.server_fd, area=f"umem{created.id}" if created.id >= 0 else ""
            )
        except BaseException:
            os.close(created.server_fd)
            os.close(created.shmem_fd)
            raise
        return cls(
            Created(known.id, known.size, known.granule_size, created.server_fd, created.shmem_fd),
            known.name,
        )

    # --- what it is ---

    @property
    def node(self) -> str:
        """Return the path that a consumer opens."""
        return node_path(self.id)

    def fileno(self) -> int:
        """Return the server's descriptor: readable while a request is pending."""
        return self.server_fd

    def info(self) -> AreaInfo:
        """Ask the driver for counts and state.  Raises DriverError."""
        return uapi.info(self.server_fd, area=self.name)

    def stats(self) -> AreaStats:
        """Ask the driver for its counters.  Raises DriverError."""
        return uapi.stats(self.server_fd, area=self.name)

    def bitmap(self, which: int = uapi.UMEM_BITMAP_CACHED) -> array.array[int]:
        """Return the state of all granules, 64 to a word, see uapi.bitmap()."""
        nr = self.size // self.granule_size
        return uapi.bitmap(self.server_fd, which, nr, area=self.name)

    def page_bitmap(self) -> array.array[int]:
        """Return which pages are cached, 64 to a word.  Raises DriverError."""
        bits = self.bitmap()
        step = self.granule_pages
        if step == 1:
            return bits
        pages = array.array("Q", bytes(8 * -(-self.npages // 64)))
        for at, word in enumerate(bits):
            while word:
                low = word & -word
                first = (64 * at + low.bit_length() - 1) * step
                if step >= 64:
                    pages[first // 64 : (first + step) // 64] = array.array(
                        "Q", [_ALL] * (step // 64)
                    )
                else:
                    pages[first // 64] |= ((1 << step) - 1) << first % 64
                word ^= low
        return pages

    def open_requests(self) -> list[int]:
        """Return the pages that are requested and missing, delivered to a server or not, in order.
        Of a granule it is the first page.  Raises DriverError.
        """
        requested = self.bitmap(uapi.UMEM_BITMAP_REQUESTED)
        cached = self.bitmap(uapi.UMEM_BITMAP_CACHED)
        step = self.granule_pages
        return [
            (64 * at + bit) * step
            for at, (wanted, here) in enumerate(zip(requested, cached, strict=True))
            if (open_ones := wanted & ~here)
            for bit in range(64)
            if open_ones >> bit & 1
        ]

    @property
    def map(self) -> mmap.mmap:
        """Return the backing file mapped shared and writable, made at the first use.

        It is written before the mark and never after it.
        """
        if self._map is None:
            self._map = mmap.mmap(self.shmem_fd, self.size)
        return self._map

    def view(self, pgoff: int, count: int) -> memoryview:
        """Return `count` pages of the backing file from page `pgoff` on, to fill in place.

        The caller releases it (`with area.view(...) as view`) before close().  ValueError past the
        end.
        """
        self._check_range(pgoff, count)
        if self._view is None:
            self._view = memoryview(self.map)
        return self._view[pgoff * PAGE_SIZE : (pgoff + count) * PAGE_SIZE]

    def write(self, pgoff: int, data: memoryview) -> None:
        """Write whole pages to the backing file, from page `pgoff` on, before they are marked.

        Cheaper than filling view(), and charged to the consumer's memory cgroup: see
        Documentation/driver.  Raises DriverError, ENOMEM among them: what was written of the range
        by then is no harm.
        """
        count = len(data) // PAGE_SIZE
        self._check_range(pgoff, count)
        offset, done = pgoff * PAGE_SIZE, 0
        try:
            while done < len(data):
                done += os.pwrite(self.shmem_fd, data[done:], offset + done)
        except OSError as e:
            raise DriverError(
                "write", e.errno or errno.EIO, area=self.name, pages=(pgoff, count)
            ) from e

    def _check_range(self, pgoff: int, count: int) -> None:
        if pgoff < 0 or count < 1 or pgoff + count > self.npages:
            raise ValueError(
                f"area {self.name}: pages {pgoff}..{pgoff + count - 1} of {self.npages}"
            )

    # --- serving ---

    def set_blocking(self, blocking: bool) -> None:
        """Let requests() sleep or not.  The flag is of the open file, so that whoever shares the
        descriptor sees it too.
        """
        os.set_blocking(self.server_fd, blocking)

    def requests(self) -> memoryview:
        """Return the next requests as 64-bit words pgoff, flags, pgoff, flags, ..., see
        RequestBuffer.get().
        """
        return self._requests.get(self.server_fd)

    def mark(
        self, ranges: Iterable[tuple[int, int]], *, touch: bool = False, poison: bool = False
    ) -> int:
        """Say that ranges of (first page, count of pages) are valid now, and wake who waits for
        them.

        With touch they are mapped for the consumer at once; with poison they are lost instead, and
        the consumer gets SIGBUS.  Returns how many granules were missing before.  More ranges than
        one call takes are marked in several calls, each of which takes effect as a whole.  Raises
        DriverError; what an earlier call marked stays marked.
        """
        marks, nr_new = self._marks, 0
        marks.clear()
        for pgoff, count in ranges:
            if marks.full:
                nr_new += marks.flush(self.server_fd, touch=touch, poison=poison)
            marks.add(pgoff, count)
        return nr_new + marks.flush(self.server_fd, touch=touch, poison=poison)

    def set_loss_policy(self, timeout_ms: int) -> None:
        """Choose what becomes of consumers when the server is gone: SIGBUS after so many
        milliseconds, or with 0 they wait.  Raises DriverError.
        """
        uapi.set_loss_policy(self.server_fd, timeout_ms, area=self.name)

    def make_anonymous(self) -> None:
        """Have the driver out of the way of an area that is complete: its mappings become plain
        shared memory.  Raises DriverError: EBUSY before that.
        """
        uapi.make_vma_anonymous(self.server_fd, area=self.name)

    # --- the log of writes ---

    def set_dirty_log(self, on: bool) -> None:
        """Have the driver note which granules consumers write to, see uapi.set_dirty_log().

        A mapping that is just being made is waited for.  Raises DriverError: EBUSY (it does
        already), ENOMEM.
        """
        _try_again(lambda: uapi.set_dirty_log(self.server_fd, on, area=self.name))

    def dirty(self, *, clear: bool = True) -> tuple[array.array[int], int]:
        """Return the log, 64 granules to a word, and how many granules it has; clear it.

        The words are valid until the next call.  Raises DriverError: ENODATA (it is off).
        """
        if self._dirty is None:
            self._dirty = uapi.DirtyBuffer(self.size // self.granule_size, area=self.name)
        buffer = self._dirty
        return buffer.words, buffer.read(self.server_fd, clear=clear)

    # --- the end ---

    def close(self) -> None:
        """Close the descriptors and the mapping; again is harmless.

        The area stays while a consumer has it open or mapped.  BufferError when a view() is still
        held: the descriptors are closed then, the mapping stays until the view is released.
        """
        fds = (self.server_fd, self.shmem_fd)
        self.server_fd = self.shmem_fd = -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)
        if self._view is not None:
            self._view.release()
            self._view = None
        if self._map is not None:
            self._map.close()
            self._map = None

    def __enter__(self) -> Self:
        """Return the area itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close; while an exception is on its way, without one of its own about a held view."""
        if error is None:
            self.close()
        else:
            # A view held by the failing frame must not hide the failure.
            with contextlib.suppress(BufferError):
                self.close()
