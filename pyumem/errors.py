# SPDX-License-Identifier: GPL-2.0-or-later
"""Errors of pyumem.  One root, so that the command line can turn any of them into one line of text."""

from __future__ import annotations

import os


class UmemError(Exception):
    """Root of every error that pyumem raises on purpose."""


class DriverError(UmemError):
    """A call into the driver failed.

    errno is the driver's, as in the uapi header.  area (a name or a node) and pages (first page, count) say what the call was
    about and are part of the text; either may be missing when the call was about neither.
    """

    def __init__(
        self, what: str, errno: int, *, area: str = "", pages: tuple[int, int] | None = None
    ) -> None:
        self.what = what
        self.errno = errno
        self.area = area
        self.pages = pages
        where = f"area {area}: " if area else ""
        which = f", pages {pages[0]}..{pages[0] + pages[1] - 1}" if pages else ""
        super().__init__(f"{where}{what}{which}: {os.strerror(errno)}")
