# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon of a destination host: `umemctl serve`.

It answers the launcher and the status command on its control socket and keeps one IncomingVm for
each VM that is expected. One daemon per runtime directory: a lock file says who it is.

Ending it: SIGTERM or SIGINT ends QEMUs that still wait, gives up migrations before their commit
(their VMs go on at the source), and stops. While a guest depends on it for its missing pages the
first signal only says so; a second one stops it, and that guest then waits.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import pyumem
from pyumem import runtime
from pyumem.areafs import AreaDirectory
from pyumem.control import Asker, ControlServer, Handler
from pyumem.errors import ControlError
from pyumem.incoming import IncomingRequest, IncomingVm

log = logging.getLogger(__name__)

_HISTORY: Final = 20
_SECOND_S: Final = 60.0
"""Seconds within which a second signal is meant as one."""


class Daemon:
    """The daemon.  run() until a signal ends it."""

    def __init__(self, token: bytes) -> None:
        """Take nothing yet."""
        self._token = token
        self._directory = AreaDirectory()
        self._vms: dict[str, IncomingVm] = {}
        self._lives: dict[str, asyncio.Task[None]] = {}
        self._history: deque[dict[str, Any]] = deque(maxlen=_HISTORY)
        self._stop = asyncio.Event()
        self._warned_of: list[str] = []
        self._warned_at = 0.0
        self._commands: dict[str, Handler] = {"status": self._status, "incoming": self._incoming}

    async def run(self, on_ready: Callable[[], None] = lambda: None) -> None:
        """Serve until a signal.

        Raises ControlError when another daemon serves this runtime directory.
        """
        directory = runtime.make_private(runtime.runtime_dir())
        loop = asyncio.get_running_loop()
        with (
            runtime.LockFile(
                directory / "serve.lock", f"umemctl serve runs already for {directory}"
            ),
            self._directory,
        ):
            async with ControlServer(runtime.serve_socket(), self._answer):
                for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                    if signal.getsignal(number) is signal.SIG_IGN:
                        continue  # nohup
                    loop.add_signal_handler(number, self.request_stop, number.name)
                log.info(
                    "ready on %s (pid %d, %s)",
                    runtime.serve_socket(),
                    os.getpid(),
                    "with a token" if self._token else "no token: any peer may send a VM",
                )
                on_ready()
                try:
                    await self._stop.wait()
                finally:
                    await self._end_all()
        log.info("stopped")

    def request_stop(self, why: str) -> None:
        """End, unless a guest depends on this process and this is the first time."""
        dependent = [vm.name for vm in self._vms.values() if vm.depends_on_us]
        now = time.monotonic()
        if dependent and not (self._warned_of == dependent and now - self._warned_at < _SECOND_S):
            self._warned_of, self._warned_at = dependent, now
            log.warning(
                "%s: not stopping: %s still get(s) memory through this process; "
                "a second signal within a minute stops it all the same, and the guest then waits",
                *(why, ", ".join(dependent)),
            )
            return
        log.info("%s: stopping", why)
        self._stop.set()

    async def _end_all(self) -> None:
        for vm in self._vms.values():
            if vm.migration:
                vm.migration.give_up("umemctl serve was stopped")
        # Migrations that gave up end by themselves, having told the source; everything else is cut.
        lives = list(self._lives.values())
        giving_up = [
            self._lives[vm.name]
            for vm in self._vms.values()
            if vm.migration and not vm.migration.state.committed
        ]
        if giving_up:
            await asyncio.wait(giving_up, timeout=5.0)
        for life in lives:
            life.cancel()
        await asyncio.gather(*lives, return_exceptions=True)

    # --- questions ---

    async def _answer(self, question: dict[str, Any], asker: Asker) -> dict[str, Any]:
        handler = self._commands.get(question["command"])
        if handler is None:
            raise ControlError(f"unknown command {question['command']!r}")
        return await handler(question, asker)

    async def _status(self, _question: dict[str, Any], _asker: Asker) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "version": pyumem.__version__,
            "runtime_dir": str(runtime.runtime_dir()),
            "token": bool(self._token),
            "vms": [vm.to_json() for vm in self._vms.values()],
            "history": list(self._history),
        }

    async def _incoming(self, question: dict[str, Any], launcher: Asker) -> dict[str, Any]:
        request = IncomingRequest.from_json(question)
        if request.name in self._vms:
            raise ControlError(f"a VM named {request.name} is expected already: give -name another")
        if self._stop.is_set():
            raise ControlError("umemctl serve is stopping")
        vm = IncomingVm(request, self._token, launcher, self._directory.path)
        self._vms[request.name] = vm
        try:
            areas = await vm.open()
        except BaseException:
            del self._vms[request.name]
            raise
        log.info(
            "%s: areas %s",
            vm.name,
            ", ".join(f"{a['id']} = {a['path']} ({a['size_bytes'] >> 20} MiB)" for a in areas),
        )
        self._lives[vm.name] = asyncio.create_task(self._live(vm), name=f"VM {vm.name}")
        return {"areas": areas}

    async def _live(self, vm: IncomingVm) -> None:
        try:
            await vm.run()
        except Exception:
            log.exception("%s: an error of ours", vm.name)
        finally:
            if vm.migration:
                self._history.append({"name": vm.name, **vm.migration.to_json()})
                vm.migration.free()
            self._vms.pop(vm.name, None)
            self._lives.pop(vm.name, None)
