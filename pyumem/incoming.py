# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM that is expected on this host: its areas, its QEMU, its port, and the one migration that
comes to it.

`umem-qemu ... -postcopy -incoming` asks `umemctl serve` for it.  It is released, with everything it
holds, when its QEMU ends, when the migration failed (its QEMU is ended then), or when every page is
here.

The launcher keeps its connection.  It is told when the VM has arrived; until then it ends its QEMU
when it hears that there will be no VM, or when this process is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pyumem.address import Address, listen, name_of, parse
from pyumem.area import Area
from pyumem.control import Asker
from pyumem.destination import Migration, Target
from pyumem.errors import DriverError, LinkError, ProtocolError, RefusedError, UmemError
from pyumem.greeting import WELCOME_S, AsyncLink, admit, refuse, welcome
from pyumem.hello import MAX_AREAS, AreaSpec, Hello, Lane, flag, text, valid_name
from pyumem.lanes.link import tune
from pyumem.qemu import DESTINATION_CAPABILITIES, Qemu
from pyumem.report import State
from pyumem.uapi import PAGE_SIZE

log = logging.getLogger(__name__)

MAX_STRANGERS: Final = 16
"""Connections that are being greeted at a time; more wait in the kernel's queue."""
_QEMU_START_S: Final = 120.0
_ORPHAN_S: Final = 20.0
"""Seconds that a QEMU without its launcher gets to answer, so that it can be ended."""
_READY_S: Final = WELCOME_S / 2
_END_PATIENCE_S: Final = 1.0
_POLL_PAUSED_S: Final = 1.0


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
        self, request: IncomingRequest, token: bytes, launcher: Asker, directory: Path | None
    ) -> None:
        """Take nothing yet.  directory is where areas are files, if anywhere."""
        self._directory = directory
        self.request: Final = request
        self._launcher = launcher
        self._problem = ""
        self._token = token
        self._areas: list[Area] = []
        self._sockets: list[socket.socket] = []
        self._qemu: Qemu | None = None
        self._ready = asyncio.Event()
        self._strangers = asyncio.Semaphore(MAX_STRANGERS)
        self._tasks: set[asyncio.Task[None]] = set()
        self.migration: Migration | None = None
        self._migrated = asyncio.Event()

    @property
    def name(self) -> str:
        """Return the VM's name."""
        return self.request.name

    @property
    def state(self) -> str:
        """Return "starting", "waiting", or the state of its migration."""
        if self.migration:
            return self.migration.state.value
        return "waiting" if self._ready.is_set() else "starting"

    @property
    def depends_on_us(self) -> bool:
        """Tell whether a guest waits, or will wait, for pages that come through this process."""
        return self.migration is not None and self.migration.state in (
            State.POSTCOPY_ACTIVE,
            State.POSTCOPY_PAUSED,
        )

    def to_json(self) -> dict[str, Any]:
        """Return what status shows."""
        areas = []
        for area, block in zip(self._areas, self.request.blocks, strict=False):
            known = area.info()
            areas.append(
                {
                    "id": block.id,
                    "node": area.node,
                    "path": self._path(area),
                    "size_bytes": area.size,
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
            self._sockets = listen(self.request.address)
            for block in self.request.blocks:
                # An ioctl that allocates; not in the event loop.
                area = await asyncio.to_thread(Area.create, f"{self.name}.{block.id}", block.size)
                self._areas.append(area)
                if area.size != block.size:
                    raise ProtocolError(
                        f"RAM block {block.id}: {block.size} bytes is no multiple of the granule, "
                        f"{area.granule_size} bytes"
                    )
        except BaseException:
            self._release_files()
            raise
        return [
            {"id": block.id, "path": self._path(area), "size_bytes": area.size}
            for area, block in zip(self._areas, self.request.blocks, strict=True)
        ]

    async def run(self) -> None:
        """Live until the VM is here, or is not to come any more.  Frees everything."""
        try:
            for sock in self._sockets:
                self._spawn(self._accept(sock), f"accept {self.request.address}")
            if await self._attach():
                await self._wait()
                await self._hand_over()
        finally:
            await self._release()

    async def _attach(self) -> bool:
        """Connect to the QEMU that the launcher starts and make it wait for its device state."""
        try:
            await self._find_qemu()
            if self._qemu is None:
                log.info("%s: its launcher is gone before its QEMU started", self.name)
                return False
            await self._qemu.require_capabilities(DESTINATION_CAPABILITIES)
            self._qemu.identify({area.name: area.shmem_fd for area in self._areas})
            if self._launcher.gone.is_set():
                log.warning("%s: its launcher is gone; ending its QEMU", self.name)
                return False
            await self._qemu.set_capabilities(dict.fromkeys(DESTINATION_CAPABILITIES, True))
            await self._qemu.execute("migrate-incoming", uri=f"unix:{self.request.incoming}")
        except UmemError as e:
            self._problem = f"cannot use its QEMU: {e}"
            log.error("%s: %s", self.name, self._problem)
            return False
        self._ready.set()
        log.info(
            "%s: QEMU (pid %d) waits; source expected on %s",
            *(self.name, self._qemu.pid, self.request.address),
        )
        return True

    async def _find_qemu(self) -> None:
        """Wait for QEMU, or until its launcher is gone without having started it.

        Raises QemuError, CheckError.
        """
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
        assert self._qemu is not None
        gone = asyncio.create_task(self._qemu.gone.wait(), name=f"{self.name}: QEMU")
        migrated = asyncio.create_task(self._migrated.wait(), name=f"{self.name}: migrated")
        try:
            await asyncio.wait({gone, migrated}, return_when=asyncio.FIRST_COMPLETED)
            if self.migration and not self._migrated.is_set():
                await migrated  # QEMU is gone; the migration finds out and tells the source
            if self.migration and self.migration.state is State.POSTCOPY_PAUSED:
                log.error(
                    "%s: postcopy-paused: %s; the guest waits for its missing pages",
                    *(self.name, self.migration.reason),
                )
                await self._while_paused(gone, self.migration)
            if self._qemu.gone.is_set():
                log.info("%s: QEMU (pid %d) is gone", self.name, self._qemu.pid)
        finally:
            gone.cancel()
            migrated.cancel()
            await asyncio.gather(gone, migrated, return_exceptions=True)

    async def _hand_over(self) -> None:
        """Take the driver out of the guest's way when every page is here."""
        if self.migration is None or self.migration.state is not State.COMPLETED:
            return
        for area in self._areas:
            try:
                # It waits for QEMU's mmap lock; not in the event loop.
                if area.info().complete:  # not when the guest ended before that
                    await asyncio.to_thread(area.make_anonymous)
            except DriverError as e:
                # Nothing is lost: a complete area is served by the driver as well.
                log.warning("%s: %s", self.name, e)

    async def _while_paused(self, gone: asyncio.Task[Any], migration: Migration) -> None:
        while not gone.done():
            await asyncio.wait({gone}, timeout=_POLL_PAUSED_S)
            if migration.arrived_after_all():
                log.info("%s: complete after all: its last pages were on their way", self.name)
                return

    def _spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(coroutine, name=f"{self.name}: {name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _release(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        committed = self.migration is not None and self.migration.state.committed
        if not committed:
            self._tell_given_up()
        # In reverse; what one of them meets does not keep the others from being freed.
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._release_files)
            if self._qemu:
                stack.push_async_callback(self._qemu.close)
                if not committed:
                    # It has no VM and will not get one.
                    stack.push_async_callback(self._end_qemu, self._qemu)
            if self.migration:
                stack.push_async_callback(self.migration.close)
        log.info("%s: released (%s)", self.name, self.state)

    def _tell_given_up(self) -> None:
        """Have the launcher end its QEMU with an error, unless QEMU ended by itself."""
        if self.migration is None and self._qemu is not None and self._qemu.gone.is_set():
            return
        reason = self.migration.reason if self.migration else self._problem
        self._launcher.tell("given-up", reason=reason or "umemctl serve stops")
        self._launcher.dismiss()

    async def _end_qemu(self, qemu: Qemu) -> None:
        if not await qemu.end(_END_PATIENCE_S):
            log.error("%s: QEMU (pid %d) does not end: kill it", self.name, qemu.pid)

    def _release_files(self) -> None:
        for sock in self._sockets:
            sock.close()
        self._sockets = []
        for area in self._areas:
            area.close()
        self._areas = []

    # --- connections ---

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._strangers.acquire()
            try:
                sock, at = await loop.sock_accept(listener)
            except OSError as e:
                self._strangers.release()
                log.warning("%s: accept: %s", self.name, e.strerror)
                await asyncio.sleep(1)
                continue
            except BaseException:
                self._strangers.release()
                raise
            tune(sock)
            self._spawn(self._connection(AsyncLink(sock, name_of(at))), f"peer {name_of(at)}")

    async def _connection(self, link: AsyncLink) -> None:
        """Greet one connection and put it where it belongs."""
        migration = None
        try:
            try:
                hello = await admit(link, self._token)
            finally:
                self._strangers.release()
            if hello.lane is Lane.CONTROL:
                migration = await self._begin(hello, link)
            elif self.migration is None:
                await refuse(link, f"session {hello.session} is not known here")
                raise RefusedError(f"{link.peer}: {hello.lane} lane without a session")
            else:
                await self.migration.add_lane(hello, link, self._token)
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
                self._migrated.set()

    async def _begin(self, hello: Hello, link: AsyncLink) -> Migration:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_READY_S):
                await self._ready.wait()
        problem = self._area_problem(hello)
        if not self._ready.is_set():
            problem = "its QEMU has not started yet"
        elif self.migration is not None:
            problem = f"a migration from {self.migration.peer} is {self.migration.state}"
        if problem:
            await refuse(link, f"VM {self.name}: {problem}")
            raise RefusedError(f"{link.peer}: {problem}")
        assert self._qemu is not None
        by_id = {b.id: area for b, area in zip(self.request.blocks, self._areas, strict=True)}
        target = Target(
            name=self.name,
            areas=[by_id[area.id] for area in hello.areas],
            qemu=self._qemu,
            incoming=self.request.incoming,
            autostart=self.request.autostart,
            touch=self.request.touch,
            on_arrival=lambda: self._launcher.tell("arrived"),
        )
        self.migration = Migration(target, hello, link)
        log.info("%s: migration of %s begins, from %s", self.name, hello.vm, link.peer)
        try:
            await welcome(link, self._token, hello)
        except LinkError:
            self.migration = None
            raise
        return self.migration

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
        if missing := [b for b in ours.values() if b.id not in {a.id for a in hello.areas}]:
            return f"the source does not have RAM block {_names(missing)}"
        return ""


def _names(blocks: Iterable[AreaSpec]) -> str:
    return ", ".join(block.id for block in blocks)


def _because(reason: str) -> str:
    return f": {reason}" if reason else ""
