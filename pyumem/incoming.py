# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM that is expected on this host: its areas, its QEMU, its port, and the one migration that
comes to it.

`umem-qemu ... -postcopy -incoming` asks `umemctl serve` for it.  It is released, with everything it
holds, when its QEMU ends, when the migration failed (its QEMU is ended then), or when every page is
here.  A source that lost its connection comes back to the same port; where it may not know how it
ended, a verdict is left for it (pyumem.verdicts).  A VM whose daemon was killed is adopted by the
next one, from its record and the driver's areas.

The launcher keeps its connection.  It is told when the VM has arrived; until then it ends its QEMU
when it hears that there will be no VM, or when this process is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import time
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pyumem import latency, reports
from pyumem.address import Address, listen, name_of, parse
from pyumem.area import HOST_PAGE, Area, Granule
from pyumem.arrival import DriverCounts, Sample, latencies, resident_map
from pyumem.control import Asker
from pyumem.destination import Migration, Phase, Target
from pyumem.errors import (
    DriverError,
    LinkError,
    ProtocolError,
    QemuError,
    RefusedError,
    UmemError,
    UsageError,
)
from pyumem.greeting import WELCOME_S, AsyncLink, admit, lane_security, refuse, welcome
from pyumem.hello import MAX_AREAS, AreaSpec, Hello, Lane, flag, text, valid_name
from pyumem.incoming_record import IncomingRecord
from pyumem.lanes.link import tune
from pyumem.process import ProcessName
from pyumem.qemu import DESTINATION_CAPABILITIES, Qemu
from pyumem.recovery import Fate
from pyumem.report import State
from pyumem.strangers import Strangers
from pyumem.tls import Security
from pyumem.uapi import PAGE_SIZE
from pyumem.verdicts import Judged, Verdicts

log = logging.getLogger(__name__)

_QEMU_START_S: Final = 120.0
_ORPHAN_S: Final = 20.0
"""Seconds that a QEMU without its launcher gets to answer, so that it can be ended."""
_USABLE_S: Final = 5.0
_READY_S: Final = WELCOME_S / 2
_END_PATIENCE_S: Final = 1.0
_POLL_PAUSED_S: Final = 1.0
_REATTACH_S: Final = 10.0
_START_AGAIN_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class IncomingRequest:
    """What the launcher asks for."""

    name: str
    address: Address
    blocks: tuple[AreaSpec, ...]
    qmp: Path
    incoming: Path
    autostart: bool
    touch: bool
    """Map pages for the guest as they come (`-postcopy-flags 1`)."""

    @classmethod
    def from_json(cls, message: dict[str, Any]) -> IncomingRequest:
        """Check and read a question of the control socket.  Raises ProtocolError, UsageError."""
        name = text(message, "name")
        if not valid_name(name):
            raise ProtocolError(f"{name!r} cannot be a VM's name")
        blocks = message.get("areas")
        if not isinstance(blocks, list) or not 1 <= len(blocks) <= MAX_AREAS:
            raise ProtocolError(f"'areas' is missing or no list of 1 to {MAX_AREAS}")
        return cls(
            name=name,
            address=parse(text(message, "listen"), listening=True),
            blocks=tuple(AreaSpec.from_json(block) for block in blocks),
            qmp=Path(text(message, "qmp")),
            incoming=Path(text(message, "incoming")),
            autostart=flag(message, "autostart"),
            touch=flag(message, "touch"),
        )


class IncomingVm:
    """One of them.  open(), then run() until it is over."""

    def __init__(
        self,
        request: IncomingRequest,
        security: Security,
        launcher: Asker | None,
        directory: Path | None,
        verdicts: Verdicts,
        *,
        granule: Granule = HOST_PAGE,
    ) -> None:
        """Take nothing yet.  directory is where areas are files, if anywhere; there is no launcher
        to talk to when this VM was adopted.
        """
        self._granule = granule
        self._verdicts = verdicts
        self._started = asyncio.Event()
        self._directory = directory
        self.request: Final = request
        self._launcher = launcher
        self._problem = ""
        self._security = security
        self._areas: list[Area] = []
        self._sockets: list[socket.socket] = []
        self._qemu: Qemu | None = None
        self._ready = asyncio.Event()
        self._strangers = Strangers()
        self._listeners: list[asyncio.Task[None]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.migration: Migration | None = None
        self._ended = asyncio.Event()
        """Set while no connection of the source is served, after there was one."""
        self._resumed = asyncio.Event()
        self._one_resume = asyncio.Lock()
        self._record: IncomingRecord | None = None
        self._adopted_session: str | None = None
        self._ours = False
        """COMMIT came: its QEMU is the VM, and not ours to end."""
        self.judged = False
        """A source that comes back finds a verdict."""

    @property
    def name(self) -> str:
        """Return the VM's name."""
        return self.request.name

    @property
    def state(self) -> str:
        """Return "starting", "waiting", or the state of its migration."""
        if self.migration:
            if self.migration.starved and self.migration.state is State.POSTCOPY_ACTIVE:
                return State.POSTCOPY_PAUSED.value
            return self.migration.state.value
        if self._record:
            return State.POSTCOPY_PAUSED.value
        return "waiting" if self._ready.is_set() else "starting"

    @property
    def depends_on_us(self) -> bool:
        """Tell whether a guest waits, or will wait, for pages that come through this process."""
        if self.migration is None:
            return self._record is not None
        return self.migration.state.committed and not self.migration.state.over

    def sample(self) -> Sample:
        """Return what the daemon's metrics tell."""
        known = [area.info() for area in self._areas]
        migration = self.migration
        return Sample(
            vm=self.name,
            state=self.state,
            ram_bytes=sum(one.size for one in known),
            resident_bytes=sum(one.nr_cached * one.granule_size for one in known),
            lanes=migration.by_lane() if migration else {},
            recoveries=migration.recoveries if migration else 0,
            driver=DriverCounts.of(self._areas),
        )

    def to_json(self, *, detail: bool = False) -> dict[str, Any]:
        """Return what status shows; detail: and what top does besides."""
        areas = []
        for area, block in zip(self._areas, self.request.blocks, strict=False):
            known = area.info()
            areas.append(
                {
                    "id": block.id,
                    "node": area.node,
                    "path": self._path(area),
                    "size_bytes": area.size,
                    "granule_bytes": area.granule_size,
                    "cached_bytes": known.nr_cached * known.granule_size,
                }
            )
        return {
            "name": self.name,
            "state": self.state,
            "listen": str(self.request.address),
            "qemu_pid": self._qemu.pid if self._qemu else 0,
            "areas": areas,
            "migration": self.migration.to_json() if self.migration else None,
            **(self._detail() if detail else {}),
        }

    def _detail(self) -> dict[str, Any]:
        lanes = self.migration.by_lane() if self.migration else {}
        return {
            "resident_map": resident_map(self._areas),
            "demand_latency_histogram": latency.to_json(latencies(lanes)),
        }

    def _path(self, area: Area) -> str:
        """Return what QEMU is to map: the area's file, or its node where there is none."""
        return str(self._directory / area.name) if self._directory else area.node

    # --- life ---

    async def open(self) -> list[dict[str, Any]]:
        """Listen and make the areas.

        Returns where each RAM block is to be found.  Raises UsageError, DriverError.
        """
        try:
            self._sockets = await self._listen()
            for block in self.request.blocks:
                # An ioctl that allocates; not in the event loop.
                area = await asyncio.to_thread(
                    Area.create,
                    f"{self.name}.{block.id}",
                    block.size,
                    granule_size=self._granule.size,
                    huge=self._granule.huge,
                )
                self._areas.append(area)
                if area.size != block.size:
                    raise ProtocolError(
                        f"RAM block {block.id}: {block.size} bytes is no multiple of the granule, "
                        f"{area.granule_size} bytes (umemctl serve --granule)"
                    )
        except BaseException:
            self._release_files()
            self._close_sockets()
            raise
        return [
            {"id": block.id, "path": self._path(area), "size_bytes": area.size}
            for area, block in zip(self._areas, self.request.blocks, strict=True)
        ]

    async def _listen(self) -> list[socket.socket]:
        """Return the port's sockets.  Raises UsageError."""
        address = self.request.address
        # May ask a name server; not in the event loop.
        if not await asyncio.to_thread(self._security.admits, address):
            raise UsageError(
                f"{address} is open to the network and umemctl serve has no TLS credentials: start "
                "it with --tls-creds DIR, or with --insecure; or use tcp:localhost:PORT"
            )
        return listen(address)

    async def run(self) -> None:
        """Live until the VM is here, or is not to come any more.

        Frees everything.
        """
        try:
            for sock in self._sockets:
                task = self._spawn(self._accept(sock), f"accept {self.request.address}")
                self._listeners.append(task)
            if self._record is not None or await self._attach():
                await self._wait()
                await self._hand_over()
        finally:
            await self._release()

    # --- a VM that another process received ---

    @classmethod
    async def adopt(
        cls,
        record: IncomingRecord,
        security: Security,
        directory: Path | None,
        verdicts: Verdicts,
    ) -> IncomingVm | None:
        """Take over a VM whose daemon is no more.

        Returns None when there is none any more, and a verdict of it.  Raises UmemError; what was
        taken is freed.
        """
        request = IncomingRequest(
            name=record.name,
            address=parse(record.listen, listening=True),
            blocks=record.areas,
            qmp=Path(record.qmp),
            incoming=Path(record.incoming),
            autostart=record.autostart,
            touch=record.touch,
        )
        vm = cls(request, security, None, directory, verdicts)
        vm._record, vm._adopted_session = record, record.hello.session
        vm._ours = record.ours
        if not record.ours:
            # Its launcher has ended its QEMU by now, or is about to: COMMIT never came.
            await record.qemu.kill(_END_PATIENCE_S)
            vm._judge(Fate.ABORTED, "umemctl serve was killed before COMMIT came")
            return None
        try:
            vm._qemu = Qemu.adopt(request.qmp, record.qemu)
        except QemuError as e:
            if verdicts.of(record.hello.session):
                vm._forget_record()  # it was judged, and its record about to go
            else:
                vm._judge(Fate.GONE, str(e))
            return None
        try:
            vm._sockets = await vm._listen()
            for block, number in zip(record.areas, record.area_ids, strict=True):
                area = await vm._reattach(number)
                vm._areas.append(area)
                if (area.name, area.size) != (f"{record.name}.{block.id}", block.size):
                    raise DriverError("re-attach", errno.ENXIO, area=f"{record.name}.{block.id}")
        except BaseException:
            vm._release_files()
            vm._close_sockets()
            if vm._qemu:
                await vm._qemu.close()
            raise
        vm._begin_start(record.phase)
        vm._ready.set()
        log.info("%s: adopted, its source is expected on %s", vm.name, request.address)
        return vm

    async def _reattach(self, number: int) -> Area:
        """Take an area over.  The workers of a daemon that was killed end a moment after it."""
        deadline = time.monotonic() + _REATTACH_S
        while True:
            try:
                return await asyncio.to_thread(Area.reattach, number)
            except DriverError as e:
                if e.errno != errno.EBUSY or time.monotonic() > deadline:
                    raise
                await asyncio.sleep(_END_PATIENCE_S / 10)

    # --- what becomes of it ---

    def _begin_start(self, phase: Phase) -> None:
        if phase is Phase.COMMITTED_RUN:
            self._spawn(self._start(), "start")
        else:
            if phase is Phase.COMMITTED:
                log.info("%s: committed, the VM stands, paused, here", self.name)
            self._started.set()

    async def _start(self) -> None:
        """Have it run, whatever becomes of the source's connection meanwhile."""
        assert self._qemu is not None
        await self._qemu.answers.wait()
        said = ""
        while not self._qemu.gone.is_set():
            try:
                await self._qemu.execute("cont")
                break
            except UmemError as e:
                if str(e) != said:
                    said = str(e)
                    log.error("%s: cannot be continued: %s; tried again", self.name, e)
                await asyncio.sleep(_START_AGAIN_S)
        try:
            self._note(Phase.STARTED)
        except UmemError as e:
            # It runs, that counts; the next daemon, if there is one, says `cont` once more.
            log.error("%s: %s", self.name, e)
        log.info("%s: committed, the VM runs here", self.name)
        self._started.set()

    def _judge(self, fate: Fate, reason: str = "") -> None:
        """Leave word for a source that comes back, and forget the VM."""
        session = self._session
        assert session is not None
        address = str(self.request.address)
        judged = Judged(session, self.name, address, time.time(), fate, reason)
        self.judged = True
        # What is on no disk yet the next daemon has to find out from the record.
        if self._verdicts.judge(judged):
            self._forget_record()

    def _note(self, phase: Phase) -> None:
        """Leave word for a daemon that comes after this one.  Raises UmemError."""
        if self._record is None:
            assert self._qemu is not None and self.migration is not None
            self._record = IncomingRecord(
                name=self.name,
                listen=str(self.request.address),
                phase=phase,
                hello=self.migration.hello,
                qmp=str(self.request.qmp),
                incoming=str(self.request.incoming),
                qemu=ProcessName.of(self._qemu.pid),
                autostart=self.request.autostart,
                touch=self.request.touch,
                areas=self.request.blocks,
                area_ids=tuple(area.id for area in self._areas),
            )
        self._record = self._record.at(phase)
        self._record.write()
        if phase in (Phase.COMMITTED, Phase.COMMITTED_RUN):
            self._ours = True
            if self._launcher:
                self._launcher.tell("arrived")
            self._begin_start(phase)

    def _forget_record(self) -> None:
        if self._record is not None:
            self._record.remove()
            self._record = None

    async def _attach(self) -> bool:
        """Connect to the QEMU that the launcher starts and make it wait for its device state."""
        try:
            await self._find_qemu()
            if self._qemu is None:
                log.info("%s: its launcher is gone before its QEMU started", self.name)
                return False
            await self._qemu.require_capabilities(DESTINATION_CAPABILITIES)
            if self._qemu.foreign:
                log.info(
                    "%s: QEMU (pid %d) is another user's: should its VM not come, it is for "
                    "umem-qemu alone to end it",
                    *(self.name, self._qemu.pid),
                )
            else:
                self._qemu.identify({area.name: area.shmem_fd for area in self._areas})
            if self._launcher and self._launcher.gone.is_set():
                log.warning("%s: its launcher is gone; ending its QEMU", self.name)
                return False
            await self._qemu.set_capabilities(dict.fromkeys(DESTINATION_CAPABILITIES, True))
            await self._qemu.execute("migrate-incoming", uri=f"unix:{self.request.incoming}")
            if self._qemu.foreign:
                await self._until_usable(self.request.incoming)
        except UmemError as e:
            self._problem = f"cannot use its QEMU: {e}"
            log.error("%s: %s", self.name, self._problem)
            return False
        self._ready.set()
        self._spawn(self._watch_monitor(self._qemu), "monitor")
        log.info(
            "%s: QEMU (pid %d) waits; source expected on %s",
            *(self.name, self._qemu.pid, self.request.address),
        )
        return True

    async def _watch_monitor(self, qemu: Qemu) -> None:
        """One that waits and does not listen waits in vain; one that has its VM is left alone."""
        await qemu.wait_unusable()
        if not self._ours and not qemu.gone.is_set():
            log.error("%s: its QEMU (pid %d) closed its QMP socket", self.name, qemu.pid)
            await self._end_qemu(qemu)

    async def _until_usable(self, path: Path) -> None:
        """Wait until the launcher has let us connect to a socket of its QEMU.  Raises QemuError."""
        deadline = time.monotonic() + _USABLE_S
        while not os.access(path, os.R_OK | os.W_OK, effective_ids=True):
            if time.monotonic() > deadline:
                raise QemuError(f"{path} cannot be used by uid {os.geteuid()}")
            await asyncio.sleep(_END_PATIENCE_S / 50)

    async def _find_qemu(self) -> None:
        """Wait for QEMU, or until its launcher is gone without having started it.

        Raises QemuError, CheckError.
        """
        assert self._launcher is not None
        gone = asyncio.create_task(self._launcher.gone.wait(), name=f"{self.name}: launcher")
        attach = asyncio.create_task(
            Qemu.connect_when_there(self.request.qmp, _QEMU_START_S), name=f"{self.name}: attach"
        )
        try:
            await asyncio.wait({gone, attach}, return_when=asyncio.FIRST_COMPLETED)
            if not attach.done() and any(area.info().mapped for area in self._areas):
                # The launcher was killed, and its QEMU goes on without it.
                await asyncio.wait({attach}, timeout=_ORPHAN_S)
        finally:
            gone.cancel()
            attach.cancel()
            _, found = await asyncio.gather(gone, attach, return_exceptions=True)
            if isinstance(found, Qemu):
                self._qemu = found  # also of a life that ends here: it has to be ended, too
        if isinstance(found, UmemError):
            raise found

    async def _wait(self) -> None:
        """Return when QEMU is gone, or when no connection is to be expected any more."""
        assert self._qemu is not None
        gone = asyncio.create_task(self._qemu.gone.wait(), name=f"{self.name}: QEMU")
        try:
            if self.migration is None and self._record is None:
                await self._one_of(gone, self._ended)
            while not gone.done() or (self.migration and not self._ended.is_set()):
                if self.migration is not None:
                    await self._ended.wait()  # of a QEMU that is gone it learns by itself
                    if not self._ended.is_set():
                        continue  # the source is back already
                    if self.migration.state is not State.POSTCOPY_PAUSED:
                        break
                    log.error(
                        "%s: postcopy-paused: %s; the guest waits for its missing pages",
                        *(self.name, self.migration.reason),
                    )
                if await self._while_paused(gone):
                    break
            if self._qemu.gone.is_set():
                log.info("%s: QEMU (pid %d) is gone", self.name, self._qemu.pid)
        finally:
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)

    async def _one_of(
        self, gone: asyncio.Task[Any], event: asyncio.Event, timeout: float | None = None
    ) -> None:
        """Wait until QEMU is gone, the event is set, or so many seconds have passed."""
        waiting = asyncio.create_task(event.wait(), name=f"{self.name}: wait")
        try:
            await asyncio.wait(
                {gone, waiting}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)

    async def _while_paused(self, gone: asyncio.Task[Any]) -> bool:
        """Wait for the source.  True when it need not come any more."""
        while not gone.done():
            await self._one_of(gone, self._resumed, _POLL_PAUSED_S)
            if self._resumed.is_set():
                self._resumed.clear()
                return False
            if self._started.is_set() and all(area.info().complete for area in self._areas):
                log.info("%s: complete after all: its last pages were on their way", self.name)
                if self.migration:
                    self.migration.arrived_after_all()
                return True
        return True

    async def _hand_over(self) -> None:
        """Take the driver out of the guest's way when every page is here."""
        assert self._qemu is not None
        if not self._ours or self._qemu.gone.is_set():
            return
        for area in self._areas:
            try:
                # It waits for QEMU's mmap lock; not in the event loop.
                if area.info().complete:  # not when the guest ended before that
                    await asyncio.to_thread(area.make_anonymous)
            except DriverError as e:
                # Nothing is lost: a complete area is served by the driver as well.
                log.warning("%s: %s", self.name, e)

    def _spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine, name=f"{self.name}: {name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def expect_nobody(self) -> None:
        """Take no connection any more."""
        for task in self._listeners:
            task.cancel()

    async def _release(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._pass_judgement()
        if not self._ours and self._launcher:
            self._tell_given_up(self._launcher)
        # In reverse; what one of them meets does not keep the others from being freed.
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._close_sockets)
            stack.callback(self._release_files)
            stack.callback(self._keep_report)
            if self._qemu:
                stack.push_async_callback(self._qemu.close)
                if not self._ours:
                    # It has no VM and will not get one.
                    stack.push_async_callback(self._end_qemu, self._qemu)
            if self.migration:
                stack.push_async_callback(self.migration.close)
        log.info("%s: released (%s)", self.name, self.state)

    def _keep_report(self) -> None:
        """Leave word of how it went: the workers have ended, the areas are open still."""
        if self.migration:
            reports.keep(reports.Side.DESTINATION, self.migration.report().to_json())

    def _pass_judgement(self) -> None:
        """Leave word for a source that does not know how it ended, and a record for the next daemon
        if it has not ended.
        """
        migration, qemu = self.migration, self._qemu
        if self._session is None or self.judged:
            return
        confirmed = migration is not None and (
            migration.state is State.COMPLETED and not migration.unconfirmed
        )
        if not self._ours:
            # Who gave it up itself knows; whoever else may have said COMMIT by now.
            if migration and migration.prepared and migration.state is not State.CANCELLED:
                self._judge(Fate.ABORTED, migration.reason or "umemctl serve was stopped")
                return
        elif self._alive and not self._started.is_set():
            return  # it is to run, and does not: the next daemon's
        elif confirmed:
            pass
        else:
            self._judge_ours(migration, qemu)
            return
        self._forget_record()

    @property
    def _alive(self) -> bool:
        return self._qemu is not None and not self._qemu.gone.is_set()

    def _judge_ours(self, migration: Migration | None, qemu: Qemu | None) -> None:
        """Leave word of a VM that was here, of which the source does not know how it ended."""
        if migration is not None and migration.guest_ended:
            self._judge(Fate.ENDED, migration.guest_ended)
        elif all(area.info().complete for area in self._areas):
            self._judge(Fate.COMPLETE)
        elif self._alive:
            return  # the next daemon's, since this one ends
        elif qemu is not None and qemu.shutdown_reason:
            self._judge(Fate.ENDED, qemu.shutdown_reason)
        else:
            self._judge(Fate.GONE, migration.reason if migration else "its QEMU is gone")

    def _tell_given_up(self, launcher: Asker) -> None:
        """Have the launcher end its QEMU with an error, unless QEMU ended by itself."""
        if self.migration is None and self._qemu is not None and self._qemu.gone.is_set():
            return
        reason = self.migration.reason if self.migration else self._problem
        launcher.tell("given-up", reason=reason or "umemctl serve stops")
        launcher.dismiss()

    async def _end_qemu(self, qemu: Qemu) -> None:
        if not await qemu.end(_END_PATIENCE_S):
            log.error("%s: QEMU (pid %d) does not end: kill it", self.name, qemu.pid)

    def _close_sockets(self) -> None:
        for sock in self._sockets:
            sock.close()
        self._sockets = []

    def _release_files(self) -> None:
        for area in self._areas:
            area.close()
        self._areas = []

    # --- connections ---

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, at = await loop.sock_accept(listener)
            except OSError as e:
                log.warning("%s: accept: %s", self.name, e.strerror)
                await asyncio.sleep(1)
                continue
            tune(sock)
            link = AsyncLink(sock, name_of(at))
            self._strangers.add(link, str(at[0]))
            self._spawn(self._connection(link), f"peer {link.peer}")

    async def _connection(self, link: AsyncLink) -> None:
        """Greet one connection and put it where it belongs."""
        migration = None
        try:
            try:
                hello = await admit(link, self._security, self._lane_token)
            finally:
                self._strangers.remove(link)
            if hello.lane is Lane.CONTROL and hello.resume:
                migration = await self._resume(hello, link)
            elif hello.lane is Lane.CONTROL:
                migration = await self._begin(hello, link)
            elif self.migration is None:
                await refuse(link, f"session {hello.session} is not known here")
                raise RefusedError(f"{link.peer}: {hello.lane} lane without a session")
            else:
                await self.migration.add_lane(hello, link)
        except (ProtocolError, LinkError, RefusedError, UmemError, OSError) as e:
            log.warning("%s: connection refused: %s", self.name, e)
        finally:
            if migration is None:
                link.close()
        if migration is not None:
            try:
                await migration.run()
                log.info(
                    "%s: migration %s%s", self.name, migration.state, _because(migration.reason)
                )
            finally:
                self._ended.set()

    async def _begin(self, hello: Hello, link: AsyncLink) -> Migration:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_READY_S):
                await self._ready.wait()
        problem = self._area_problem(hello)
        if not self._ready.is_set():
            problem = "its QEMU has not started yet"
        elif self.migration is None and self._record is not None:
            problem = "it has arrived already"
        elif self.migration is not None:
            problem = f"a migration from {self.migration.peer} is {self.migration.state}"
        if problem:
            await refuse(link, f"VM {self.name}: {problem}")
            raise RefusedError(f"{link.peer}: {problem}")
        lanes = lane_security(link, self._security)
        self.migration = Migration(self._target(hello), hello, link, lanes)
        log.info("%s: migration of %s begins, from %s", self.name, hello.vm, link.peer)
        try:
            await welcome(link, self._security.token, hello, lanes)
        except BaseException:
            self.migration.free()
            self.migration = None
            self._ended.set()
            raise
        return self.migration

    def _target(self, hello: Hello) -> Target:
        assert self._qemu is not None
        by_id = {b.id: area for b, area in zip(self.request.blocks, self._areas, strict=True)}
        return Target(
            name=self.name,
            areas=[by_id[area.id] for area in hello.areas],
            qemu=self._qemu,
            incoming=self.request.incoming,
            autostart=self.request.autostart,
            touch=self.request.touch,
            on_phase=self._note,
            started=self._started,
        )

    async def _resume(self, hello: Hello, link: AsyncLink) -> Migration | None:
        """Take a source back that knows, or believes, that its VM is here.

        Returns the migration that goes on, None when it was told of another VM how it ended.
        """
        if await self._verdicts.tell(hello, link, self._security.token):
            return None
        async with self._one_resume:
            problem = self._area_problem(hello)
            if hello.session != self._session:
                problem = f"session {hello.session} is not known here"
            if problem:
                await refuse(link, f"VM {self.name}: {problem}")
                raise RefusedError(f"{link.peer}: {problem}")
            if self.migration and not self._ended.is_set():
                self.migration.cut("the source connected anew")
                await self._ended.wait()
            if self.migration:
                await self.migration.close()
            lanes = lane_security(link, self._security)
            await welcome(link, self._security.token, hello, lanes)
            before = self.migration
            if (before and before.state is not State.POSTCOPY_PAUSED) or not self._ours:
                # It ends, or has ended; a source that comes again finds a verdict.
                raise RefusedError(f"{link.peer}: too late to resume {self.name}: {self.state}")
            self.migration = Migration(
                self._target(hello), hello, link, lanes, before=before, resumed=True
            )
            if before:
                before.free()
            self._ended.clear()
            self._resumed.set()
            log.info("%s: the source is back, from %s", self.name, link.peer)
            return self.migration

    def _lane_token(self) -> bytes | None:
        return self.migration.lanes.token if self.migration else None

    @property
    def _session(self) -> str | None:
        """Return the session of the VM that is here, or nearly was."""
        if self.migration:
            return self.migration.hello.session
        return self._adopted_session

    def _area_problem(self, hello: Hello) -> str:
        """Compare the source's RAM with ours."""
        ours = {block.id: block for block in self.request.blocks}
        for area in hello.areas:
            if area.page_size != PAGE_SIZE:
                return f"pages of {area.page_size} bytes at the source, of {PAGE_SIZE} here"
            if area.id not in ours:
                return f"RAM block {area.id} is not known here ({_names(ours.values())} are)"
            if area.size != ours[area.id].size:
                return (
                    f"RAM block {area.id} has {area.size} bytes at the source and "
                    f"{ours[area.id].size} here: give both QEMUs the same -m"
                )
        if hello.precopy_lanes and any(area.granule_pages > 1 for area in self._areas):
            return "pre-copy needs granules of a page: `umemctl serve` has --granule, use -p"
        if missing := [b for b in ours.values() if b.id not in {a.id for a in hello.areas}]:
            return f"the source does not have RAM block {_names(missing)}"
        return ""


def _names(blocks: Iterable[AreaSpec]) -> str:
    return ", ".join(block.id for block in blocks)


def _because(reason: str) -> str:
    return f": {reason}" if reason else ""
