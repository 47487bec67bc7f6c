# SPDX-License-Identifier: GPL-2.0-or-later
"""Errors of pyumem.

One root, so that the command line can turn any of them into one line of text and an exit status.
"""

from __future__ import annotations

import os
from typing import ClassVar


class UmemError(Exception):
    """Root of every error that pyumem raises on purpose.

    exit_status is what a command ends with: 1 means that it failed and that the VM, if any, still
    runs where it ran.
    """

    exit_status: ClassVar[int] = 1


def of_system(e: OSError) -> UmemError:
    """Return an error of the system as one of ours: a line that names the file."""
    return UmemError(f"{e.filename}: {e.strerror}" if e.filename else str(e.strerror or e))


class UsageError(UmemError):
    """The command line or an address makes no sense."""

    exit_status = 2


class CheckError(UmemError):
    """Something essential is missing on this host, or on this VM; the text names the fix."""

    exit_status = 3


class ControlError(UmemError):
    """A daemon on this host cannot be reached through its socket, or said no."""


class QemuError(UmemError):
    """QEMU, or the conversation with it, failed."""


class WorkerError(UmemError):
    """A lane's process failed or died."""


class LinkError(UmemError):
    """The connection to the peer broke or came to an early end."""


class ProtocolError(UmemError):
    """A peer said something that the protocol does not allow; the connection is closed."""


class ForeignPeerError(ProtocolError):
    """The peer does not speak this protocol at all."""


class VersionError(ProtocolError):
    """The peer speaks another version of this protocol."""

    exit_status = 3


class RefusedError(UmemError):
    """The peer refused the migration and gave a reason; nothing was changed."""

    exit_status = 3


class LostError(UmemError):
    """The migration broke after the commit: the guest waits at the destination for pages that are
    here.
    """

    exit_status = 4


class InterruptedByUserError(UmemError):
    """Ctrl-C before the commit; the VM runs on at the source."""

    exit_status = 130


class DriverError(UmemError):
    """A call into the driver failed.

    errno is the driver's, as in the uapi header.  area (a name or a node) and pages (first page,
    count) say what the call was about and are part of the text; either may be missing when the call
    was about neither.
    """

    def __init__(
        self, what: str, errno: int, *, area: str = "", pages: tuple[int, int] | None = None
    ) -> None:
        """Compose the text."""
        self.what = what
        self.errno = errno
        self.area = area
        self.pages = pages
        where = f"area {area}: " if area else ""
        which = f", pages {pages[0]}..{pages[0] + pages[1] - 1}" if pages else ""
        super().__init__(f"{where}{what}{which}: {os.strerror(errno)}")
