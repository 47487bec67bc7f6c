# SPDX-License-Identifier: GPL-2.0-or-later
"""Giving the source's RAM back while it moves (`umemctl migrate --release-ram`).

The destination says every few seconds which pages it has (HAVE).  A page that it has is never read
here again: it was sent by whoever claimed it, and a recovery asks the driver there anew.  So it is
punched out of the RAM file, and the host has its memory back before the migration ends.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Final, Self

from pyumem.claims import spread
from pyumem.errors import CheckError, of_system
from pyumem.holes import punch
from pyumem.qemu import RamBlock
from pyumem.ram import PAGE_SIZE

CONFIRM_S: Final = 2.0
"""Seconds between two HAVEs of the destination."""


class Release:
    """The RAM files, opened for that.  A context manager."""

    def __init__(self, ram: Sequence[RamBlock]) -> None:
        """Open them.

        Raises CheckError for RAM of which nothing can be given back: an area of the driver by its
        node, or a file that may not be written.
        """
        self._ram = ram
        self._gone = [bytearray(-(-block.size // PAGE_SIZE // 8)) for block in ram]
        self._fds: list[int] = []
        self.failed = False
        """Its file system does not do that: no more is tried."""
        self.pages = 0
        """How many were given back."""
        try:
            for block in ram:
                self._open(block)
        except BaseException:
            self.close()
            raise

    def _open(self, block: RamBlock) -> None:
        why = f"--release-ram: RAM block {block.id}: {block.path}"
        try:
            fd = os.open(block.path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as e:
            raise CheckError(f"{why}: {e.strerror}") from e
        self._fds.append(fd)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise CheckError(f"{why} is no regular file: nothing of it can be given back early")

    def take(self, area: int, pgoff: int, bits: bytes | memoryview) -> None:
        """Give back what a HAVE has new.  pgoff is a multiple of 8.  Raises UmemError.

        Blocks for as long as the kernel takes to free the pages.
        """
        with memoryview(self._gone[area])[pgoff // 8 : pgoff // 8 + len(bits)] as gone:
            new = bytes(now & ~before for now, before in zip(bits, gone, strict=True))
            gone[:] = bytes(now | before for now, before in zip(new, gone, strict=True))
        for first, count in runs(new, pgoff):
            start = first * PAGE_SIZE
            try:
                punch(self._fds[area], start, count * PAGE_SIZE)
            except OSError as e:
                self.failed = True
                raise of_system(OSError(e.errno, e.strerror, self._ram[area].path)) from None
            self.pages += count

    def close(self) -> None:
        """Close the files; again is harmless."""
        for fd in self._fds:
            os.close(fd)
        self._fds = []

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


def runs(
    bits: bytes | memoryview, pgoff: int = 0, count: int | None = None
) -> Iterator[tuple[int, int]]:
    """Yield the stretches of set bits: (first page, count), the lowest bit of each byte first.

    pgoff is the page of the first bit; count, if given, how many of the bits count.
    """
    pages = spread(bits)[:count]
    at = 0
    while (first := pages.find(b"\1", at)) >= 0:
        at = pages.find(b"\0", first)
        at = len(pages) if at < 0 else at
        yield pgoff + first, at - first
