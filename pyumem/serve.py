# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon of a destination host: `umemctl serve`.

It answers the launcher and the status command on its control socket and keeps one IncomingVm for
each VM that is expected. One daemon per runtime directory: a lock file says who it is.

VMs that a daemon before this one received, and whose memory is not all here yet, are adopted at the
start: it may have been killed, or ended all the same.

Ending it: SIGTERM or SIGINT ends QEMUs that still wait, gives up migrations before their commit
(their VMs go on at the source), and stops. While a guest depends on it for its missing pages the
first signal only says so; a second one stops it, and that guest then waits.  A service manager
asks once before it kills, so that its first signal counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, Final

import pyumem
from pyumem import incoming_record, runtime, verdicts
from pyumem.address import Address, parse
from pyumem.area import HOST_PAGE, Granule
from pyumem.areafs import AreaDirectory
from pyumem.arrival import Snapshot
from pyumem.control import Asker, ControlServer, Handler
from pyumem.errors import ControlError
from pyumem.incoming import IncomingRequest, IncomingVm
from pyumem.incoming_record import IncomingRecord, left_behind
from pyumem.service import Manager, inherited_socket
from pyumem.tls import Security
from pyumem.verdicts import Verdicts, stay_for
from pyumem.worker import may_hurry

log = logging.getLogger(__name__)

_HISTORY: Final = 20
_ADOPT_AGAIN_S: Final = 5.0
_SECOND_S: Final = 60.0
"""Seconds within which a second signal is meant as one."""


class Daemon:
    """The daemon.  run() until a signal ends it."""

    def __init__(
        self,
        security: Security,
        granule: Granule = HOST_PAGE,
        *,
        metrics: Address | None = None,
        names: set[str] | None = None,
    ) -> None:
        """Take nothing yet.  granule: what areas of VMs to come are made of; metrics: where
        Prometheus asks, if anywhere; to names the VMs' are added, for the log.
        """
        self._metrics = metrics
        self._names = set() if names is None else names
        self._ended: Counter[str] = Counter()
        self._security = security
        self._granule = granule
        self._manager = Manager.from_environment()
        self._directory = AreaDirectory()
        self._vms: dict[str, IncomingVm] = {}
        self._lives: dict[str, asyncio.Task[None]] = {}
        self._verdicts = Verdicts()
        self._stays: dict[Address, asyncio.Task[None]] = {}
        self._adoption: asyncio.Task[None] | None = None
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
        inherited = inherited_socket(runtime.serve_socket())
        # Now, and not when the first VM is on its way: they may be another user's.
        for needed in (incoming_record.directory(), verdicts.directory()):
            runtime.make_private(needed)
        loop = asyncio.get_running_loop()
        with (
            runtime.LockFile(
                directory / "serve.lock", f"umemctl serve runs already for {directory}"
            ),
            self._directory,
        ):
            async with (
                self._tell_prometheus(),
                ControlServer(runtime.serve_socket(), self._answer, inherited),
            ):
                for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                    if signal.getsignal(number) is signal.SIG_IGN:
                        continue  # nohup
                    loop.add_signal_handler(number, self.request_stop, number.name)
                log.info(
                    "ready on %s (pid %d, %s)",
                    runtime.serve_socket(),
                    os.getpid(),
                    self._security.describe(),
                )
                if not may_hurry():
                    log.info(
                        "requested pages are served at normal priority: no LimitNICE=-10, and not "
                        "root"
                    )
                on_ready()
                self._adoption = asyncio.create_task(self._adopt_all(), name="adopt")
                self._manager.ready(self._in_short())
                told = asyncio.create_task(
                    self._manager.follow(self._in_short), name="service manager"
                )
                try:
                    await self._stop.wait()
                    self._manager.stopping(f"stopping: {self._in_short()}")
                finally:
                    await self._end_all()
                    told.cancel()
                    await asyncio.gather(told, return_exceptions=True)
        log.info("stopped")

    def request_stop(self, why: str) -> None:
        """End, unless a guest depends on this process and this is the first time."""
        dependent = [vm.name for vm in self._vms.values() if vm.depends_on_us]
        now = time.monotonic()
        if dependent and self._manager.there:
            log.warning(
                "%s: stopping, though %s still get(s) memory through this process: the guest waits "
                "for the next one",
                *(why, ", ".join(dependent)),
            )
            self._stop.set()
            return
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

    def _in_short(self) -> str:
        """Return what `systemctl status` shows."""
        vms = ", ".join(f"{vm.name} {vm.state}" for vm in self._vms.values())
        return vms or "no VM is expected"

    async def _adopt_all(self) -> None:
        """Take over what other daemons left, each for itself: one that cannot be had now is tried
        again and again.
        """
        self._verdicts.load()
        self._stay_where_wanted()
        await asyncio.gather(*(self._adopt(record) for record in left_behind()))

    async def _adopt(self, record: IncomingRecord) -> None:
        said = ""
        self._names.add(record.name)
        while not self._stop.is_set():
            try:
                if record.name in self._vms:
                    raise ControlError("a VM of that name is expected")
                await self._end_stays(parse(record.listen, listening=True).port)
                vm = await IncomingVm.adopt(
                    record, self._security, self._directory.path, self._verdicts
                )
            except Exception as e:
                if str(e) != said:
                    said = str(e)
                    log.error("%s: cannot be adopted: %s; tried again", record.name, e)
                self._stay_where_wanted()
                await asyncio.sleep(_ADOPT_AGAIN_S)
                continue
            if vm is None:
                self._stay_where_wanted()
            else:
                self._vms[vm.name] = vm
                self._lives[vm.name] = asyncio.create_task(self._live(vm), name=f"VM {vm.name}")
            return

    # --- ports that are listened on for sources that come back ---

    def _stay_where_wanted(self) -> None:
        """Listen wherever a source has to be told something, and no VM is expected that does."""
        if self._stop.is_set():
            return
        expected = {vm.request.address.port for vm in self._vms.values()}
        for address in self._verdicts.addresses:
            there = self._stays.get(address)
            if address.port not in expected and (there is None or there.done()):
                self._stays[address] = asyncio.create_task(
                    stay_for(address, self._verdicts, self._security), name=f"stay for {address}"
                )

    async def _end_stays(self, port: int) -> None:
        """Leave a port to somebody else."""
        tasks = [self._stays.pop(at) for at in list(self._stays) if at.port == port]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _end_all(self) -> None:
        if self._adoption:
            self._adoption.cancel()
            await asyncio.gather(self._adoption, return_exceptions=True)
        for vm in self._vms.values():
            vm.expect_nobody()
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
        for address in list(self._stays):
            await self._end_stays(address.port)

    # --- questions ---

    async def _answer(self, question: dict[str, Any], asker: Asker) -> dict[str, Any]:
        handler = self._commands.get(question["command"])
        if handler is None:
            raise ControlError(f"unknown command {question['command']!r}")
        return await handler(question, asker)

    def _tell_prometheus(self) -> contextlib.AbstractAsyncContextManager[int | None]:
        if self._metrics is None:
            return contextlib.nullcontext()
        # Takes longer to import than the rest of the daemon together.
        from pyumem.metrics import serve

        return serve(self._metrics, self._snapshot)

    def _snapshot(self) -> Snapshot:
        return Snapshot([vm.sample() for vm in self._vms.values()], dict(self._ended))

    async def _status(self, question: dict[str, Any], _asker: Asker) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "version": pyumem.__version__,
            "runtime_dir": str(runtime.runtime_dir()),
            "token": bool(self._security.token),
            "tls": self._security.credentials is not None,
            "vms": [vm.to_json(detail=bool(question.get("detail"))) for vm in self._vms.values()],
            "history": list(self._history),
        }

    async def _incoming(self, question: dict[str, Any], launcher: Asker) -> dict[str, Any]:
        request = IncomingRequest.from_json(question)
        if request.name in self._vms:
            raise ControlError(f"a VM named {request.name} is expected already: give -name another")
        if self._stop.is_set():
            raise ControlError("umemctl serve is stopping")
        await self._end_stays(request.address.port)
        vm = IncomingVm(
            request,
            self._security,
            launcher,
            self._directory.path,
            self._verdicts,
            granule=self._granule,
        )
        self._vms[request.name] = vm
        self._names.add(request.name)
        try:
            areas = await vm.open()
        except BaseException:
            del self._vms[request.name]
            self._stay_where_wanted()
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
                self._ended[vm.migration.state] += 1
                self._history.append({"name": vm.name, **vm.migration.to_json()})
                vm.migration.free()
            self._vms.pop(vm.name, None)
            self._lives.pop(vm.name, None)
        self._stay_where_wanted()
