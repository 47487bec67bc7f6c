# SPDX-License-Identifier: GPL-2.0-or-later
"""A process of another program's, named so that the name outlives both it and us."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from dataclasses import dataclass
from pathlib import Path

from pyumem.errors import UmemError

_START_TIME_FIELD = 22  # proc(5), /proc/PID/stat


@dataclass(frozen=True, slots=True)
class ProcessName:
    """A process id, and when the process started (clock ticks since boot): ids come again."""

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> ProcessName:
        """Return the name of a process.  Raises UmemError when there is none."""
        try:
            line = Path(f"/proc/{pid}/stat").read_text()
        except OSError as e:
            raise UmemError(f"process {pid} is gone") from e
        # The second field, the command in parentheses, may contain anything.
        return cls(pid, int(line.rpartition(")")[2].split()[_START_TIME_FIELD - 3]))

    def open(self) -> int | None:
        """Return a descriptor of it (pidfd), the caller's; None when it is gone."""
        try:
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return None
        # Looked at with the descriptor open: the id cannot be used again meanwhile.
        with contextlib.suppress(UmemError):
            if ProcessName.of(self.pid) == self:
                return fd
        os.close(fd)
        return None

    def signal(self, number: signal.Signals) -> bool:
        """Send it a signal.  Tells whether it was there.  Raises UmemError when it may not be."""
        fd = self.open()
        if fd is None:
            return False
        try:
            signal.pidfd_send_signal(fd, number)
        except ProcessLookupError:
            return False
        except OSError as e:
            raise UmemError(f"process {self.pid}: {number.name}: {e.strerror}") from e
        finally:
            os.close(fd)
        return True

    async def kill(self, seconds: float) -> bool:
        """End it without asking and wait so long for its end.  Tells whether it is gone.

        Another user's process is only waited for.
        """
        fd = self.open()
        if fd is None:
            return True
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(fd, ended.set)
        try:
            with contextlib.suppress(PermissionError):
                signal.pidfd_send_signal(fd, signal.SIGKILL)
            async with asyncio.timeout(seconds):
                await ended.wait()
        except TimeoutError:
            return False
        except OSError as e:
            if not isinstance(e, ProcessLookupError):
                raise UmemError(f"process {self.pid}: SIGKILL: {e.strerror}") from e
        finally:
            loop.remove_reader(fd)
            os.close(fd)
        return True
