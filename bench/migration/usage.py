# SPDX-License-Identifier: GPL-2.0-or-later
"""What processes use while they are watched: processor time and memory, with those they start."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path

from bench.migration.results import Process

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_LOOK_S = 0.25


@dataclass
class _Seen:
    """What is known of one process."""

    first_s: float
    last_s: float
    memory_mib: float


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

    What one uses between the last look and its end is missed, and that of a child which another
    than the watched one waits for, too.
    """

    def __init__(self, pids: dict[str, int]) -> None:
        """Watch these, by name, and all that descend from them."""
        self._pids = pids
        self._seen: dict[str, dict[int, _Seen]] = {name: {} for name in pids}
        self._peaks = dict.fromkeys(pids, 0.0)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Usage:
        """Begin."""
        self._look(first=True)
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

    def _look(self, *, first: bool = False) -> None:
        for name, pid in self._pids.items():
            wanted, total = [pid], 0.0
            while wanted:
                one = wanted.pop()
                wanted += _children(one)
                try:
                    cpu_s, memory_mib = _cpu_s(one), _memory_mib(one)
                except OSError:
                    continue
                known = self._seen[name].setdefault(one, _Seen(cpu_s if first else 0.0, 0.0, 0.0))
                known.last_s, known.memory_mib = cpu_s, memory_mib
                total += memory_mib
            self._peaks[name] = max(self._peaks[name], total)

    def processes(self) -> list[Process]:
        """Return what each used since the beginning."""
        found = []
        for name, seen in self._seen.items():
            root = seen.get(self._pids[name])
            # A child that was waited for is in its parent's time already.
            alive = {self._pids[name], *_descendants(self._pids[name])}
            cpu_s = sum(
                max(0.0, one.last_s - one.first_s)
                for pid, one in seen.items()
                if pid in alive or one is root
            )
            found.append(Process(name, round(cpu_s, 3), round(self._peaks[name], 1)))
        return found


def _descendants(pid: int) -> list[int]:
    found = _children(pid)
    for one in list(found):
        found += _descendants(one)
    return found
