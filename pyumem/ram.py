# SPDX-License-Identifier: GPL-2.0-or-later
"""The source's RAM: a shared file, mapped for reading only, and what of it is zero.

A hole of a tmpfs file must not be read through the map: the read fault would allocate the page, on
a host that migrates a VM away perhaps because it is short of memory.  So SEEK_DATA is asked first,
and only data is looked at.
"""

from __future__ import annotations

import bisect
import ctypes
import errno
import mmap
import os
import stat
from collections.abc import Iterator
from types import TracebackType
from typing import Final, Self

from pyumem.errors import UmemError

PAGE_SIZE: Final = mmap.PAGESIZE
_WORDS: Final = PAGE_SIZE // 8
_FEW: Final = 4
"""Pages up to which each is asked for by itself: what a request brings."""

_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_memcmp.restype = ctypes.c_int


class _PyBuffer(ctypes.Structure):
    """Py_buffer of the C API: the way to the address of a read-only map, which ctypes'
    from_buffer() refuses.
    """

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


def _address_of(view: memoryview) -> int:
    buffer = _PyBuffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(view), ctypes.byref(buffer), 0)
    address = int(buffer.buf or 0)
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))
    return address


class RamFile:
    """One RAM block of the source.  size is bytes, npages host pages.  A context manager."""

    def __init__(self, fd: int, name: str, size: int, *, live: bool = False) -> None:
        """Own fd from now on and map `size` bytes of it.

        live: the guest runs, so what was found to be a hole may be none a moment later.  Raises
        UmemError when the file is too small.
        """
        self.fd = fd
        self._live = live
        self.name: Final = name
        self.size: Final = size
        self.npages: Final = size // PAGE_SIZE
        if size % PAGE_SIZE or not size:
            os.close(fd)
            raise UmemError(f"RAM block {name}: {size} bytes are not whole pages")
        try:
            status = os.fstat(fd)
            # A node of the driver knows no holes, and fstat() tells no size of it.
            self._sparse = stat.S_ISREG(status.st_mode)
            if self._sparse and status.st_size < size:
                raise UmemError(
                    f"RAM block {name}: its file has {status.st_size} bytes, QEMU says {size}"
                )
            self._map = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
        except BaseException:
            os.close(fd)
            raise
        self._data_starts: list[int] = []
        self._data_ends: list[int] = []
        self._view = memoryview(self._map)
        self._words = self._view.cast("Q")
        self._address = _address_of(self._view)
        self._zeros = mmap.mmap(-1, PAGE_SIZE)
        with memoryview(self._zeros) as zeros:
            self._zero_page = _address_of(zeros)

    @classmethod
    def open(cls, path: str, name: str, size: int) -> Self:
        """Open and map a RAM block's file.  Raises UmemError that names it."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise UmemError(f"RAM block {name}: cannot open {path}: {e.strerror}") from e
        return cls(fd, name, size)

    def view(self, pgoff: int, count: int) -> memoryview:
        """Return `count` pages from `pgoff` on, to send from.  Release it before close()."""
        return self._view[pgoff * PAGE_SIZE : (pgoff + count) * PAGE_SIZE]

    # --- holes ---

    def extents(self, pgoff: int, count: int) -> Iterator[tuple[bool, int, int]]:
        """Split a range of pages into (has data, first page, count)."""
        end = pgoff + count
        while pgoff < end:
            stop = self._known_data_end(pgoff)
            if not stop:
                if (data := self._seek(pgoff, os.SEEK_DATA, end)) > pgoff:
                    yield False, pgoff, data - pgoff
                    pgoff = data
                    continue
                stop = self._find_data_end(pgoff, end)
            stop = min(stop, end)
            yield True, pgoff, stop - pgoff
            pgoff = stop

    def _known_data_end(self, pgoff: int) -> int:
        """Return the end of the data around a page, as far as an earlier call found it, else 0."""
        at = bisect.bisect_right(self._data_starts, pgoff) - 1
        return self._data_ends[at] if at >= 0 and pgoff < self._data_ends[at] else 0

    def _find_data_end(self, pgoff: int, end: int) -> int:
        """Return where the data that begins at `pgoff` ends, or `end` if that comes first."""
        if self._live or end - pgoff <= _FEW:
            stop = pgoff + 1
            while stop < end and self._seek(stop, os.SEEK_DATA, end) == stop:
                stop += 1
            return stop
        # The kernel looks at every page up to the next hole, perhaps at the whole file: once is
        # enough.  The VM stands still, so what it finds stays true.
        stop = max(self._seek(pgoff, os.SEEK_HOLE, self.npages), pgoff + 1)
        at = bisect.bisect_right(self._data_starts, pgoff)
        self._data_starts.insert(at, pgoff)
        self._data_ends.insert(at, stop)
        return stop

    def _seek(self, pgoff: int, whence: int, end: int) -> int:
        """Return the page at which the next data or hole begins, at most `end`."""
        if not self._sparse:
            return pgoff if whence == os.SEEK_DATA else end
        try:
            offset = os.lseek(self.fd, pgoff * PAGE_SIZE, whence)
        except OSError as e:
            if e.errno == errno.ENXIO:  # no data up to the end of the file
                return end
            if e.errno == errno.EINVAL:  # a file system without SEEK_DATA: all of it is data
                self._sparse = False
                return pgoff if whence == os.SEEK_DATA else end
            raise
        if whence == os.SEEK_DATA:
            return min(offset // PAGE_SIZE, end)
        return min(-(-offset // PAGE_SIZE), end)

    # --- zero pages ---

    def is_zero(self, pgoff: int) -> bool:
        """Tell whether a page that has data is all zero."""
        return not _memcmp(self._address + pgoff * PAGE_SIZE, self._zero_page, PAGE_SIZE)

    def pieces(self, pgoff: int, count: int) -> Iterator[tuple[bool, int, int]]:
        """Split a range of pages into (must be sent, first page, count); what need not be sent is
        zero.
        """
        for has_data, first, nr in self.extents(pgoff, count):
            if not has_data:
                yield False, first, nr
                continue
            yield from self._by_content(first, nr)

    def _by_content(self, first: int, nr: int) -> Iterator[tuple[bool, int, int]]:
        # The first word of every page at once: few pages that begin with zeros need a full look.
        heads = self._words[first * _WORDS : (first + nr) * _WORDS : _WORDS].tolist()
        if 0 not in heads:
            yield True, first, nr
            return
        start, kind = first, None
        for page, head in enumerate(heads, first):
            content = bool(head) or not self.is_zero(page)
            if content is not kind:
                if kind is not None:
                    yield kind, start, page - start
                start, kind = page, content
        if kind is not None:
            yield kind, start, first + nr - start

    # --- the end ---

    def close(self) -> None:
        """Unmap and close; again is harmless."""
        if self.fd >= 0:
            self._words.release()
            self._view.release()
            self._map.close()
            self._zeros.close()
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        """Leave the rest to __exit__()."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()
