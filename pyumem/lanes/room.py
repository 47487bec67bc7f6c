# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether there is room for more of a guest's memory, in the memory cgroup of its QEMU and on this
host.

The pages that arrive are charged to QEMU's cgroup.  One page too many there, and the kernel ends
QEMU, with its guest, rather than have the write fail; on a host without memory it ends anything.
So the lanes stop short of it and wait, until somebody raises the limit or frees memory.

What the kernel could take back without harm (its cache of files) and put elsewhere (swap) is room.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

RESERVE: Final = 4 << 20
"""Bytes left to QEMU for what it needs itself, page tables for instance."""
_LOOK: Final = 1 << 20
"""Bytes that a lane may write between two looks; all lanes together do so within the reserve ..."""
_SHARE: Final = 64
"""... or where there is more room, such a part of it, ..."""
_SELDOM: Final = 16 << 20
"""... up to so many bytes: a look costs as much as a run or two."""
_PROC: Final = Path("/proc")


def _number(path: Path) -> int | None:
    """Return a number of bytes, None for no limit or no such file."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _fields(path: Path, *names: str) -> int:
    """Return the sum of the first numbers of some lines, whose first word is the name."""
    total = 0
    for line in path.read_text().splitlines():
        name, _, rest = line.partition(" ")
        if name.rstrip(":") in names:
            total += int(rest.split()[0])
    return total


def groups_of(pid: int, proc: Path = _PROC) -> list[Path]:
    """Return the directories of a process' cgroup (version 2) and those that it is in, the nearest
    first; none where there is no such hierarchy.
    """
    try:
        path = next(
            line.removeprefix("0::")
            for line in (proc / str(pid) / "cgroup").read_text().splitlines()
            if line.startswith("0::")
        )
        mounts = (proc / "self" / "mountinfo").read_text().splitlines()
    except (OSError, StopIteration):
        return []
    for mount in mounts:
        fields, _, rest = mount.partition(" - ")
        if rest.startswith("cgroup2 "):
            root = Path(fields.split(" ")[4])
            group = root / path.lstrip("/")
            return [one for one in (group, *group.parents) if one.is_relative_to(root)]
    return []


class Room:
    """What one lane knows of it."""

    def __init__(self, groups: Sequence[Path], proc: Path = _PROC) -> None:
        """Mind the limits of these cgroups."""
        self._groups = list(groups)
        self._meminfo = proc / "meminfo"
        self._since = self._every = _LOOK

    def lacks(self, nr_bytes: int) -> str:
        """Return what there is too little of for so many bytes more, empty for nothing.

        Costs nothing most of the time.
        """
        self._since += nr_bytes
        if self._since < self._every:
            return ""
        need, least = nr_bytes + RESERVE, _SELDOM * _SHARE
        for group in self._groups:
            left = self._left(group, need)
            if left is not None and left < need:
                return f"memory.max of {group}"
            least = min(least, least if left is None else left)
        try:
            left = 1024 * _fields(self._meminfo, "MemAvailable", "SwapFree")
            if left < need:
                return "the host's memory"
            least = min(least, left)
        except (OSError, ValueError):
            pass
        self._since, self._every = 0, max(_LOOK, least // _SHARE)
        return ""

    def _left(self, group: Path, need: int) -> int | None:
        """Return the bytes that are left to a group, exactly when it is less than is needed; None
        for one without a limit.
        """
        limit, used = _number(group / "memory.max"), _number(group / "memory.current")
        if limit is None or used is None:
            return None
        left = limit - used
        if left >= need:
            return left
        try:
            left += _fields(group / "memory.stat", "active_file", "inactive_file")
            swap = 1024 * _fields(self._meminfo, "SwapFree")
        except (OSError, ValueError):
            return left
        swap_limit, swap_used = (
            _number(group / "memory.swap.max"),
            _number(group / "memory.swap.current"),
        )
        if swap_limit is not None and swap_used is not None:
            swap = min(swap, max(0, swap_limit - swap_used))
        return left + swap
