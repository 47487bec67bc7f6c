# SPDX-License-Identifier: GPL-2.0-or-later
"""Worker processes as their parent sees them.  See worker.py for their own side of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import pyumem
from pyumem.errors import WorkerError
from pyumem.stats import StatsBlock, Totals
from pyumem.worker import MAX_MESSAGE

_READY_S: Final = 60.0
_STOP_S: Final = 2.0


class Worker:
    """One lane's process.  stop() ends it; it never stays behind as a zombie."""

    def __init__(
        self, name: str, stats: StatsBlock, on_failure: Callable[[Worker, str], None]
    ) -> None:
        """Prepare.  on_failure is told once, and not after stop(), why the worker is no more."""
        self.name: Final = name
        self._stats = stats
        self._on_failure = on_failure
        self._process: asyncio.subprocess.Process | None = None
        self._channel: socket.socket | None = None
        self._watch: asyncio.Task[None] | None = None
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._reason = ""
        self._stopping = False
        self._round: asyncio.Future[None] | None = None
        self.drained = False
        """It said that its lane has no more to do: nothing is lost with it."""
        self.is_drained: Final = asyncio.Event()

    @property
    def pid(self) -> int:
        """Return the process id, 0 before the start."""
        return self._process.pid if self._process else 0

    async def start(self, module: str, message: dict[str, Any], fds: Sequence[int]) -> None:
        """Start `python -m pyumem.lanes.<module>`, hand it the descriptors, wait until it is ready.

        fds stay the caller's.  The stats block is put behind the first of them, the socket.  Raises
        WorkerError.
        """
        try:
            await self._spawn(module, message, fds)
        except OSError as e:  # no process, no descriptor, no memory left
            raise WorkerError(f"{self.name}: cannot be started: {e.strerror}") from e
        try:
            async with asyncio.timeout(_READY_S):
                await asyncio.shield(self._ready)
        except TimeoutError:
            raise WorkerError(f"{self.name}: not ready within {_READY_S:g} s") from None

    async def _spawn(self, module: str, message: dict[str, Any], fds: Sequence[int]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self._channel = ours
        # The very package that this process uses, whatever the current directory is.
        environment = {**os.environ, "PYTHONPATH": str(Path(pyumem.__file__).parents[1])}
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-S", "-m", f"pyumem.lanes.{module}"),
                *(str(theirs.fileno()), str(os.getpid())),
                pass_fds=(theirs.fileno(),),
                env=environment,
                stdin=asyncio.subprocess.DEVNULL,
                start_new_session=True,
            )
        asyncio.get_running_loop().add_reader(ours.fileno(), self._read)
        self._watch = asyncio.create_task(self._reap(), name=f"watch {self.name}")
        socket.send_fds(
            ours, [json.dumps(message).encode()], [fds[0], self._stats.memory.fd, *fds[1:]]
        )

    def command(self, command: str) -> None:
        """Send a command.  A worker that is gone tells so by its end, not here."""
        if self._channel is not None:
            with contextlib.suppress(OSError):
                self._channel.send(json.dumps({"command": command}).encode())

    def next_round(self) -> asyncio.Future[None]:
        """Return what is done when it says that the round it is told to begin next is over."""
        self._round = asyncio.get_running_loop().create_future()
        return self._round

    def totals(self) -> Totals:
        """Return its counters, also after its end."""
        return self._stats.read()

    def _read(self) -> None:
        assert self._channel is not None
        try:
            raw = self._channel.recv(MAX_MESSAGE)
        except BlockingIOError:
            return
        except OSError:
            raw = b""
        if not raw:
            asyncio.get_running_loop().remove_reader(self._channel.fileno())
            return
        self._take(json.loads(raw))

    def _take(self, message: dict[str, Any]) -> None:
        match message["event"]:
            case "ready" if not self._ready.done():
                self._ready.set_result(None)
            case "drained":
                self.drained = True
                self.is_drained.set()
            case "round" if self._round is not None and not self._round.done():
                self._round.set_result(None)
            case "failed":
                self._reason = str(message["reason"])

    async def _reap(self) -> None:
        assert self._process is not None and self._channel is not None
        status = await self._process.wait()
        if self._stopping:
            return
        self._read_rest()
        if self._reason:
            why = self._reason
        elif status < 0:
            why = f"process {self.pid} was killed by {signal.Signals(-status).name}"
        else:
            why = f"process {self.pid} ended with status {status}"
        error = WorkerError(f"{self.name}: {why}")
        if not self._ready.done():
            self._ready.set_exception(error)
        else:
            self._on_failure(self, str(error))

    def _read_rest(self) -> None:
        """Read what the worker said just before its end."""
        assert self._channel is not None
        with contextlib.suppress(OSError):
            while raw := self._channel.recv(MAX_MESSAGE, socket.MSG_DONTWAIT):
                self._take(json.loads(raw))

    async def stop(self) -> None:
        """End the process and wait for it; again is harmless.  The counters stay readable."""
        self._stopping = True
        if self._channel is not None:
            asyncio.get_running_loop().remove_reader(self._channel.fileno())
            self._channel.close()
            self._channel = None
        if self._process is not None and self._process.returncode is None:
            # It may sleep in a blocking receive, where it does not see the channel: it has nothing
            # to lose.
            try:
                async with asyncio.timeout(_STOP_S):
                    await self._process.wait()
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    self._process.kill()
                await self._process.wait()
        if self._watch is not None:
            await self._watch
        if not self._ready.done():
            self._ready.cancel()
        elif not self._ready.cancelled():
            self._ready.exception()  # looked at, so that asyncio does not complain

    def close(self) -> None:
        """Unmap the counters, after stop()."""
        self._stats.close()


async def stop_all(workers: Sequence[Worker]) -> None:
    """Stop all of them at once."""
    await asyncio.gather(*(worker.stop() for worker in workers))
