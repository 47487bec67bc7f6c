# SPDX-License-Identifier: GPL-2.0-or-later
"""What a daemon and its service manager say to each other: sd_notify(3), the watchdog, and sockets
that are handed over (sd_listen_fds(3)).

A datagram and three environment variables; the libraries for it either need a compiler
(systemd-python) or know the datagram alone (sdnotify).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Final, Self

from pyumem.errors import ControlError

log = logging.getLogger(__name__)

_FIRST_FD: Final = 3
_LOOK_S: Final = 2.0
"""Seconds between two looks at what the status line says, where no watchdog wants it sooner."""


class Manager:
    """The service manager that started this process, if any: without one all of it does nothing."""

    def __init__(self, address: str, watchdog_s: float) -> None:
        """Use from_environment()."""
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self.watchdog_s: Final = watchdog_s
        """Seconds without a sign of life after which it kills this process; 0 for no limit."""
        self._said = ""

    @classmethod
    def from_environment(cls) -> Self:
        """Read the environment, and take out of it what is not for our own children."""
        address = os.environ.pop("NOTIFY_SOCKET", "")
        usec = os.environ.pop("WATCHDOG_USEC", "")
        whose = os.environ.pop("WATCHDOG_PID", "")
        ours = not whose or whose == str(os.getpid())
        return cls(address, int(usec) / 1e6 if ours and usec.isdecimal() else 0.0)

    @property
    def there(self) -> bool:
        """Tell whether there is one."""
        return bool(self._address)

    def _tell(self, *lines: str) -> None:
        if not self._address:
            return
        # One that does not listen is no reason to end, nor to wait.
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock,
        ):
            sock.setblocking(False)
            sock.sendto("\n".join(lines).encode(), self._address)

    def ready(self, status: str) -> None:
        """Say that the daemon answers from now on."""
        self._said = status
        self._tell("READY=1", f"STATUS={status}")

    def stopping(self, status: str) -> None:
        """Say that it is about to end."""
        self._said = status
        self._tell("STOPPING=1", f"STATUS={status}")

    async def follow(self, status: Callable[[], str]) -> None:
        """Say the status whenever it has changed, and that the event loop turns.

        A task of the very loop that does the work: where that hangs nothing is said, and the
        manager starts the daemon anew.
        """
        pause = min(_LOOK_S, self.watchdog_s / 3) if self.watchdog_s else _LOOK_S
        while self._address:
            lines = ["WATCHDOG=1"] if self.watchdog_s else []
            if (now := status()) != self._said:
                self._said = now
                lines.append(f"STATUS={now}")
            if lines:
                self._tell(*lines)
            await asyncio.sleep(pause)


def inherited_socket(path: Path) -> socket.socket | None:
    """Return the listening Unix socket that a service manager made for us, None without one.

    Its connections queue while no daemon runs, and the path stays the manager's.  Raises
    ControlError for sockets that are not the one at `path`: nobody would come there.
    """
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdecimal() or not int(count):
        return None
    for fd in range(_FIRST_FD, _FIRST_FD + int(count)):
        os.set_inheritable(fd, False)
    if int(count) != 1:
        raise ControlError(f"{count} sockets were handed over: one is wanted, {path}")
    sock = socket.socket(fileno=_FIRST_FD)
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
        sock.close()
        raise ControlError(f"what was handed over is no Unix stream socket: {path} is wanted")
    at = sock.getsockname()
    if at != str(path):
        sock.close()
        raise ControlError(
            f"the socket that was handed over is {at}, and {path} is wanted: ListenStream= and "
            "UMEM_RUNTIME_DIR have to agree"
        )
    return sock
