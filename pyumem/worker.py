# SPDX-License-Identifier: GPL-2.0-or-later
"""Worker processes: how a parent starts one, hands it sockets and areas, and hears of its end; and
the worker's side of that.

A worker is `python -m pyumem.lanes.<module> FD`.  FD is its end of a SOCK_SEQPACKET pair: one
message is one JSON object, the first one ("start") carries the descriptors over SCM_RIGHTS.  The
worker answers {"event": "ready"}, later "ended" or "failed". A worker does not outlive its parent
(PR_SET_PDEATHSIG), has a session of its own (Ctrl-C on a terminal is the parent's affair), and owns
what it was handed.  The worker's side (Channel, run) imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final

from pyumem.errors import UmemError

MAX_MESSAGE: Final = 64 * 1024
MAX_FDS: Final = 250
_PR_SET_PDEATHSIG: Final = 1
_URGENT_NICE: Final = -10


class Channel:
    """One end of the pair, blocking, as the worker uses it."""

    def __init__(self, sock: socket.socket) -> None:
        """Own the socket from now on."""
        self.sock = sock

    def fileno(self) -> int:
        """Return the descriptor to poll: readable means a command, or that the parent is gone."""
        return self.sock.fileno()

    def send(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """Send a message with descriptors, which stay the caller's too."""
        socket.send_fds(self.sock, [json.dumps(message).encode()], fds)

    def receive(self) -> tuple[dict[str, Any], list[int]] | None:
        """Return the next message and its descriptors, which are the caller's now; None when the
        other end is gone.
        """
        raw, fds, _, _ = socket.recv_fds(self.sock, MAX_MESSAGE, MAX_FDS)
        for fd in fds:
            os.set_inheritable(fd, False)
        if not raw:
            return None
        message = json.loads(raw)
        assert isinstance(message, dict)
        return message, fds

    def wait_go(self) -> bool:
        """Wait for the parent's word.  True for "go", False for an end."""
        command = self.receive()
        return command is not None and command[0].get("command") == "go"

    def close(self) -> None:
        """Close it; again is harmless."""
        self.sock.close()


def may_hurry() -> bool:
    """Tell whether hurry() is allowed here: to root, and under RLIMIT_NICE (setrlimit(2))."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NICE)
    return os.geteuid() == 0 or limit == resource.RLIM_INFINITY or limit >= 20 - _URGENT_NICE


def hurry() -> None:
    """Go before others on a busy host, where that is allowed: a guest waits for an urgent lane."""
    with contextlib.suppress(PermissionError):
        os.nice(_URGENT_NICE)


Body = Callable[[Channel, dict[str, Any], list[int]], None]
"""What a worker does between its start message and its end."""


def _die_with(parent: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


def run(body: Body) -> None:
    """Be a worker: the main() of each module in pyumem.lanes."""
    fd, parent = int(sys.argv[1]), int(sys.argv[2])
    _die_with(parent)
    channel = Channel(socket.socket(fileno=fd))
    first = channel.receive()
    if first is None:
        return
    message, fds = first
    try:
        body(channel, message, fds)
        channel.send({"event": "ended"})
    except (UmemError, OSError) as e:
        with contextlib.suppress(OSError):
            channel.send({"event": "failed", "reason": str(e)[:2000], "error": type(e).__name__})
        sys.exit(1)
