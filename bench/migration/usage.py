# SPDX-License-Identifier: GPL-2.0-or-later
"""What processes use while they are watched: processor time and memory, with those they start."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

from bench.migration.results import Process

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_LOOK_S = 0.25


def _cpu_s(pid: int) -> float:
    """User and system time, with that of children it has waited for.  Raises OSError."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(word) for word in words[11:15]) * _TICK_S


def _memory_mib(pid: int) -> float:
    """Memory of its own, in no file.  Raises OSError."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    return 0.0


def _children(pid: int) -> list[int]:
    try:
        words = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [int(word) for word in words]


class Usage:
    """Looks at some processes every quarter of a second; a context manager.

    A child's time is in its parent's once that has waited for it.  What is used between the last
    look and a process' end is missed.
    """

    def __init__(self, pids: dict[str, int]) -> None:
        """Watch these, by name, and all that descend from them."""
        self._pids = pids
        self._before = dict.fromkeys(pids, 0.0)
        self._cpu_s = dict.fromkeys(pids, 0.0)
        self._peaks = dict.fromkeys(pids, 0.0)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Usage:
        """Begin."""
        self._look()
        self._before = dict(self._cpu_s)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Look a last time."""
        self._end.set()
        self._thread.join()
        self._look()

    def _follow(self) -> None:
        while not self._end.wait(_LOOK_S):
            self._look()

    def _look(self) -> None:
        for name, pid in self._pids.items():
            cpu_s = memory_mib = 0.0
            for one in (pid, *descendants(pid)):
                with contextlib.suppress(OSError):
                    cpu_s += _cpu_s(one)
                    memory_mib += _memory_mib(one)
            # One that has ended by now has no less than it had.
            self._cpu_s[name] = max(self._cpu_s[name], cpu_s)
            self._peaks[name] = max(self._peaks[name], memory_mib)

    def processes(self) -> list[Process]:
        """Return what each used since the beginning."""
        return [
            Process(name, round(self._cpu_s[name] - self._before[name], 3), round(peak, 1))
            for name, peak in self._peaks.items()
        ]


def descendants(pid: int) -> list[int]:
    """Return the processes that a process started, and those that they did."""
    found = _children(pid)
    for one in list(found):
        found += descendants(one)
    return found
