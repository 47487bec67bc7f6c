# SPDX-License-Identifier: GPL-2.0-or-later
"""The driver's file system, in which every named area is a regular file.

QEMU's balloon, free-page reporting and virtio-mem give memory back by fallocate(), which the kernel
lets through to files and not to nodes.  `umemctl serve` mounts it when it may; without it the VM's
RAM is the area's node, and only the giving back is missing.
"""

from __future__ import annotations

import logging
import os
import stat
import subprocess
from pathlib import Path

from pyumem import runtime

log = logging.getLogger(__name__)

FILESYSTEM = "umem"
_FIRST_INO = 2
"""UMEM_FIRST_INO of the driver: what an area's number and its file's inode number differ by."""


def mounts() -> dict[Path, int]:
    """Return where the file system is mounted, with the st_dev of its files."""
    found = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        # proc(5): ID PARENT MAJOR:MINOR ROOT MOUNT-POINT OPTIONS [TAGS...] - TYPE SOURCE OPTIONS
        fields, _, rest = line.partition(" - ")
        _, _, device, _, point, *_ = fields.split(" ")
        if rest.split(" ", 1)[0] == FILESYSTEM:
            major, minor = map(int, device.split(":"))
            # Blanks and the like are octal escapes.
            raw = point.encode().decode("unicode_escape").encode("latin-1")
            found[Path(os.fsdecode(raw))] = os.makedev(major, minor)
    return found


def is_area_file(status: os.stat_result) -> bool:
    """Tell whether that is a file of the file system."""
    return status.st_dev in mounts().values()


def area_number(fd: int) -> int | None:
    """Return the N of /dev/umemN that an open node or area's file is of; None for anything else."""
    status = os.fstat(fd)
    if stat.S_ISCHR(status.st_mode):
        at = Path(f"/sys/dev/char/{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}").resolve()
        return int(at.name.removeprefix("umem")) if at.parent.name == "umem" else None
    return status.st_ino - _FIRST_INO if is_area_file(status) else None


def mount(point: Path) -> str:
    """Mount it, unless it is there already.  Returns why that cannot be, empty if it is."""
    point.mkdir(mode=0o755, exist_ok=True)
    if point in mounts():
        return ""
    argv = ["mount", "-t", FILESYSTEM, FILESYSTEM, str(point)]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
    except OSError as e:
        return f"{argv[0]}: {e.strerror}"
    if done.returncode:
        return f"{done.stderr.strip()}; as root: {' '.join(argv)}"
    return ""


class AreaDirectory:
    """The mount of one daemon.  A context manager; path is None where it may not mount."""

    def __init__(self) -> None:
        """Mount nothing yet."""
        self._point = runtime.runtime_dir() / "areas"
        self.path: Path | None = None

    def __enter__(self) -> AreaDirectory:
        """Mount it, unless a daemon that was killed has left it there."""
        if problem := mount(self._point):
            log.warning("VMs that come cannot give memory back by balloon (%s)", problem)
        else:
            self.path = self._point
        return self

    def __exit__(self, *_: object) -> None:
        """Unmount it, unless a VM has a file of it open.

        Its QEMU names the file by this path, and is known by it when it leaves.  The next daemon
        takes such a mount over.
        """
        if self.path is not None:
            subprocess.run(["umount", str(self._point)], capture_output=True, check=False)
        self.path = None
