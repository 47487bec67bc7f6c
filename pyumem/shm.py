# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory shared between a parent and its workers: a memfd and its mapping with one owner, and a
lock that a dead holder lets go.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from types import TracebackType
from typing import Final, Self


class SharedMemory:
    """A memfd mapped shared.

    The descriptor goes to other processes over SCM_RIGHTS; each maps it anew.

    Pages that are never touched take no memory.
    """

    def __init__(self, fd: int, size: int) -> None:
        """Own fd from now on and map `size` bytes of it."""
        self.fd = fd
        self.size: Final = size
        try:
            self.map = mmap.mmap(fd, size)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def create(cls, name: str, size: int) -> Self:
        """Make a new one of `size` bytes, all zero; the name shows in /proc only."""
        fd = os.memfd_create(f"umem-{name}", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, size)

    @classmethod
    def attach(cls, fd: int) -> Self:
        """Map one that another process made; fd is owned from now on."""
        return cls(fd, os.fstat(fd).st_size)

    def close(self) -> None:
        """Unmap and close; again is harmless."""
        if self.fd >= 0:
            self.map.close()
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


class ProcessLock:
    """A lock between processes that share a descriptor: an OFD lock of the kernel's.

    A semaphore or futex in shared memory would stay taken when its holder is killed; this one is
    let go with the holder's open file. Each process (and each thread that wants one of its own)
    makes its own ProcessLock of the same memfd.
    """

    # struct flock: type, whence, start, length, pid; an OFD lock wants pid 0.
    _FLOCK: Final = struct.Struct("hhqqi4x")

    def __init__(self, fd: int) -> None:
        """Lock the file behind fd; fd itself stays the caller's."""
        # An open file description of our own: the lock belongs to it, and duplicates of fd share
        # theirs.
        self._fd = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        self._take = self._FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0)
        self._drop = self._FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, 0, 1, 0)

    def __enter__(self) -> Self:
        """Take the lock, waiting for it."""
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLKW, self._take)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let go."""
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, self._drop)

    def close(self) -> None:
        """Let go and close; again is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
