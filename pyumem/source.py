# SPDX-License-Identifier: GPL-2.0-or-later
"""The source's end of one migration: `umemctl migrate -p`.

    check   all RAM on shared files, capabilities known, nobody else migrates this VM
    setup   control lane, urgent lane, background lanes; a worker for each page lane; WELCOME on all
            of them
    device  QEMU's `migrate` into a socket of ours, relayed over the control lane.  QEMU stops in
            pre-switchover with its I/O drained: from
            then on RAM is still, and the urgent lane serves; only then the device state is written
    commit  PREPARED came; the record is written; COMMIT.  One instant: before it everything can be
            undone, after it only the
            destination may run the VM
    serve   RUNNING came; our QEMU is ended for certain; pages flow until COMPLETE; BYE

Any trouble before the commit ends with the VM running here again.  After it, RAM is kept and
LostError says where.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import fcntl
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from pyumem import runtime, wire
from pyumem.address import Address
from pyumem.claims import UNPACED, ClaimMap, Slots
from pyumem.errors import (
    CheckError,
    InterruptedByUserError,
    LinkError,
    LostError,
    ProtocolError,
    QemuError,
    UmemError,
    of_system,
)
from pyumem.greeting import AsyncLink, introduce, software
from pyumem.hello import NONCE_SIZE, AreaSpec, Hello, Lane, valid_name
from pyumem.lanes.link import tune
from pyumem.lanes.prefetch import NO_PREFETCH, Prefetch
from pyumem.qemu import SOURCE_CAPABILITIES, UNLIMITED_BANDWIDTH, Qemu, RamBlock
from pyumem.ram import PAGE_SIZE
from pyumem.report import Progress, Report, State, take_arrival, totals_of
from pyumem.stats import StatsBlock, Totals
from pyumem.wire import Kind
from pyumem.workers import Worker, stop_all

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_RESUME_S: Final = 30.0
_ABORT_S: Final = 15.0
_PIECE: Final = 32 * 1024
"""Bytes of device state in one frame: an ABORT waits for one."""
_STILL_S: Final = 90.0
"""Seconds that the VM may stand still before the commit; then it goes on here."""
_ANSWER_S: Final = 60.0
"""Seconds after which the destination's silence upon COMMIT is reported; it is waited for on."""
_RESTORE_S: Final = 5.0
_POLL_S: Final = 0.05
_MAY_LEAVE: Final = ("running", "paused", "prelaunch")
_STATES: Final = "only a running or paused VM can leave"
_WHY_NOT: Final = {
    "postmigrate": "QEMU lets it leave again after `cont` at its monitor (and `stop`, if it is to "
    "be paused)",
}
_BUSY: Final = ("setup", "active", "pre-switchover", "device", "cancelling", "wait-unplug")


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done."""

    qmp: Path
    destination: Address
    token: bytes
    background: bool = True
    """False: pages only on request (`-n`), until set_background() says otherwise."""
    background_lanes: int = 1
    max_bandwidth: int | None = None
    """Bytes per second of all background lanes together; None: as fast as they can."""
    prefetch: Prefetch = NO_PREFETCH
    """Neighbours of requested pages that are sent unasked."""


class Migration:
    """One migration.  run() is its life."""

    def __init__(self, plan: Plan, tell: Callable[[str], None]) -> None:
        """Take nothing yet.  tell() gets the lines that the user should see."""
        self._plan = plan
        self._user = tell
        self._session = secrets.token_hex(16)
        self.state = State.SETUP
        self.vm = ""
        self.locked = False
        """True from when the VM's name is known and this process has it for itself."""
        self._started = time.monotonic()
        self._task: asyncio.Task[Any] | None = None
        self._interrupted = False
        self._resuming = False
        self._was_running = False
        self._recorded = False
        self._aborted = False
        self._begun: set[Lane] = set()
        self._lost: set[Worker] = set()
        self._qemu: Qemu | None = None
        self._ram: list[RamBlock] = []
        self._ram_fds: list[int] = []
        self._claims: ClaimMap | None = None
        self._link: AsyncLink | None = None
        self._lanes: dict[tuple[Lane, int], Worker] = {}
        self._background = plan.background
        self._max_bandwidth = plan.max_bandwidth
        self._broken: asyncio.Future[None] | None = None
        self._told: dict[Kind, asyncio.Future[dict[str, Any]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._control_task: asyncio.Task[None] | None = None
        self._device_bytes = 0
        self._stopped_at = 0.0
        self.report = Report("", str(plan.destination), self._session, State.SETUP)

    def _tell(self, text: str) -> None:
        """Tell the user.  A terminal that is gone or a full disk must not harm the VM."""
        with contextlib.suppress(OSError, ValueError):
            self._user(text)

    # --- what is known ---

    def _totals(self, lane: Lane) -> Totals:
        return totals_of(w.totals() for (kind, _), w in self._lanes.items() if kind is lane)

    def progress(self) -> Progress:
        """Return how far it is."""
        urgent, background = self._totals(Lane.URGENT), self._totals(Lane.BACKGROUND)
        return Progress(
            state=self.state,
            pages_total=sum(block.size for block in self._ram) // PAGE_SIZE,
            pages_demand=urgent.pages,
            pages_background=background.pages,
            pages_zero=urgent.zero_pages + background.zero_pages,
            bytes_moved=urgent.bytes_sent + background.bytes_sent,
            elapsed_s=round(time.monotonic() - self._started, 3),
        )

    def to_json(self) -> dict[str, Any]:
        """Return what status shows."""
        return {
            "name": self.vm,
            "destination": str(self._plan.destination),
            "session": self._session,
            "background": self._background,
            "max_bandwidth_bytes_s": self._max_bandwidth,
            "pid": os.getpid(),
            "error": self.report.error,
            **self.progress().to_json(),
            "workers": [
                {"lane": f"{lane.value}-{index}", "pid": worker.pid}
                for (lane, index), worker in self._lanes.items()
            ],
        }

    def set_background(self, on: bool) -> None:
        """Switch the background transfer on or off; pages come on request either way.

        Raises UmemError for what cannot be.
        """
        if not on:
            self._background = False
        elif not self._background:
            if (lanes := self._background_workers()) and lanes <= self._lost:
                raise UmemError("the connection for it was lost; pages still come on request")
            self._background = True
            if self.state.committed:
                self._go(Lane.BACKGROUND)
        self._set_pace()

    def set_max_bandwidth(self, bytes_s: int | None) -> None:
        """Limit the background transfer to so many bytes per second, None for no limit.  Requested
        pages are never limited.
        """
        self._max_bandwidth = bytes_s
        self._set_pace()

    def _set_pace(self) -> None:
        if self._claims is None:
            return
        pace = UNPACED
        if not self._background:
            pace = 0
        elif self._max_bandwidth is not None:
            pace = max(1, self._max_bandwidth // self._plan.background_lanes)
        self._claims.pace = pace

    def _go(self, lane: Lane) -> None:
        """Let the workers of a lane begin.  Once: they take a second word for the end."""
        if lane in self._begun:
            return
        self._begun.add(lane)
        for (kind, _), worker in self._lanes.items():
            if kind is lane:
                worker.command("go")

    # --- life ---

    async def run(self) -> Report:
        """Migrate.

        Returns the report.  Raises LostError after the commit; before it InterruptedByUserError or
        whatever the trouble was, with the VM running here (if it did).
        """
        self._task = asyncio.current_task()
        self._broken = asyncio.get_running_loop().create_future()
        self._told = {
            kind: asyncio.get_running_loop().create_future()
            for kind in (Kind.PREPARED, Kind.RUNNING, Kind.COMPLETE)
        }
        try:
            async with contextlib.AsyncExitStack() as stack:
                stack.push_async_callback(self._close)
                await self._until_commit(stack)
                await self._after_commit()
        except BaseException as e:
            self.report.error = str(e)
            raise
        finally:
            self._fill_report()
        return self.report

    def interrupt(self, why: str) -> None:
        """Answer Ctrl-C: undo before the commit, say no after it."""
        if self.state.committed:
            self._tell(
                f"{why}: not stopping: {self.vm} runs at {self._plan.destination} and needs "
                "its memory from here until every page is there"
            )
        elif self._resuming or self._task is None:
            self._tell(f"{why}: giving up already, {self.vm or 'the VM'} is being continued here")
        else:
            self._interrupted = True
            self._task.cancel()

    async def _until_commit(self, stack: contextlib.AsyncExitStack) -> None:
        issued = False
        try:
            await self._check(stack)
            await self._unless_broken(self._set_up())
            self.report.setup_s = round(time.monotonic() - self._started, 3)
            issued = True
            await self._unless_broken(self._send_device_state(stack))
            self._last_look()
            self._record_commit()
        except BaseException as e:
            self._resuming = True
            if self._interrupted and isinstance(e, asyncio.CancelledError):
                assert self._task is not None
                self._task.uncancel()
                self.state = State.CANCELLED
                error: BaseException = InterruptedByUserError(
                    "interrupted before the commit" if issued else "interrupted"
                )
            else:
                self.state = State.FAILED
                error = of_system(e) if isinstance(e, OSError) else e
            if not await self._undo(issued, str(error)):
                assert self._qemu is not None
                raise LostError(
                    f"{error}; and {self.vm} could not be continued here: type `migrate_cancel`, "
                    f"then `cont` at its monitor (QMP: {self._qemu.path})"
                ) from e
            if error is e:
                raise
            raise error from e if isinstance(e, OSError) else None

    def _last_look(self) -> None:
        """Raise what speaks against the commit.  No await between this and the commit."""
        assert self._broken is not None and self._qemu is not None
        if self._broken.done():
            self._broken.result()
        if self._qemu.gone.is_set():
            raise QemuError(f"the source's QEMU (pid {self._qemu.pid}) is gone")
        if self._qemu.resumed:
            raise QemuError(f"somebody continued {self.vm} at its monitor during the migration")

    # --- checks and setup ---

    async def _check(self, stack: contextlib.AsyncExitStack) -> None:
        qemu = self._qemu = await Qemu.connect(self._plan.qmp)
        await qemu.require_capabilities(SOURCE_CAPABILITIES)
        name = await qemu.name()
        self.vm = self.report.vm = name if valid_name(name) else f"qemu-{qemu.pid}"
        status = await qemu.status()
        if status not in _MAY_LEAVE:
            raise CheckError(f"VM {self.vm} is in state {status}; {_WHY_NOT.get(status, _STATES)}")
        busy = await qemu.execute("query-migrate")
        if busy.get("status") in _BUSY:
            raise CheckError(f"VM {self.vm} is being migrated already ({busy['status']})")
        self._was_running = status == "running"
        self._ram = await qemu.ram_blocks()
        self.report.ram_bytes = sum(block.size for block in self._ram)
        self.report.page_size_bytes = PAGE_SIZE
        self.report.pages_total = self.report.ram_bytes // PAGE_SIZE
        runtime.make_private(runtime.migrate_dir())
        stack.enter_context(
            runtime.LockFile(
                runtime.migrate_dir() / f"{self.vm}.lock",
                f"a migration of {self.vm} runs already",
            )
        )
        self.locked = True
        if (record := runtime.commit_record(self.vm)).exists():
            raise CheckError(
                f"{record} says that {self.vm} runs elsewhere and may need the memory kept here; "
                "remove that file if it does not"
            )
        for block in self._ram:
            try:
                fd = os.open(block.path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as e:
                raise CheckError(f"RAM block {block.id}: {block.path}: {e.strerror}") from e
            self._ram_fds.append(fd)
            # The launcher looks at this when its QEMU ends: we remove the file then, not it.
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckError(f"RAM block {block.id}: {block.path} is locked") from None
        qemu.identify({b.id: fd for b, fd in zip(self._ram, self._ram_fds, strict=True)})
        self._claims = ClaimMap.create(Slots([block.size // PAGE_SIZE for block in self._ram]))
        self._set_pace()

    def _hello(self, lane: Lane, index: int = 0) -> Hello:
        areas = tuple(AreaSpec(block.id, block.size, PAGE_SIZE) for block in self._ram)
        return Hello(
            lane=lane,
            session=self._session,
            vm=self.vm,
            nonce=secrets.token_hex(NONCE_SIZE),
            software=software(),
            index=index,
            background_lanes=self._plan.background_lanes,
            areas=areas if lane is Lane.CONTROL else (),
        )

    async def _set_up(self) -> None:
        self._link = await AsyncLink.connect(self._plan.destination)
        self._link.tune(control=True)
        await introduce(self._link, self._plan.token, self._hello(Lane.CONTROL))
        self._control_task = self._spawn(self._control(self._link), "control lane")
        assert self._qemu is not None
        self._spawn(self._watch_qemu(self._qemu), "watch QEMU")
        wanted = [(Lane.URGENT, 0)]
        wanted += [(Lane.BACKGROUND, index) for index in range(self._plan.background_lanes)]
        results = await asyncio.gather(
            *(self._add_lane(lane, index) for lane, index in wanted), return_exceptions=True
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _add_lane(self, lane: Lane, index: int) -> None:
        assert self._claims is not None
        name = f"{lane.value} lane {index} of {self.vm}"
        worker = Worker(name, StatsBlock.create(name), self._worker_failed)
        self._lanes[lane, index] = worker
        link = await AsyncLink.connect(self._plan.destination)
        try:
            await introduce(link, self._plan.token, self._hello(lane, index))
        except BaseException:
            link.close()
            raise
        module = "source_urgent" if lane is Lane.URGENT else "source_background"
        message = {
            "peer": link.peer,
            "index": index,
            "areas": [{"id": block.id, "size_bytes": block.size} for block in self._ram],
            "prefetch": self._plan.prefetch.to_json(),
        }
        with contextlib.closing(link.detach()) as sock:
            tune(sock, urgent=lane is Lane.URGENT, background=lane is Lane.BACKGROUND)
            await worker.start(
                module, message, [sock.fileno(), self._claims.memory.fd, *self._ram_fds]
            )

    # --- trouble ---

    def _worker_failed(self, worker: Worker, reason: str) -> None:
        if worker.drained or self._waits_for_go(worker):
            self._lost.add(worker)
            self._tell(f"{reason}; no page is lost with it")
        else:
            self._break(LinkError(reason))

    def _waits_for_go(self, worker: Worker) -> bool:
        """Tell whether it is a background lane of `-n` that has not claimed a page."""
        return (
            self.state.committed
            and Lane.BACKGROUND not in self._begun
            and worker in self._background_workers()
        )

    def _background_workers(self) -> set[Worker]:
        return {worker for (lane, _), worker in self._lanes.items() if lane is Lane.BACKGROUND}

    def _break(self, error: UmemError) -> None:
        if self._broken is not None and not self._broken.done():
            self._broken.set_exception(error)

    async def _unless_broken(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Do the work, but give up as soon as a lane, the peer or QEMU fails."""
        assert self._broken is not None
        task = asyncio.create_task(work, name=f"{self.vm}: work")
        try:
            waiting: set[asyncio.Future[Any]] = {task, self._broken}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            # Bad news that came at the same time as good counts, except after the commit: there
            # what the peer said last is what it did.
            if self._broken.done() and not (self.state.committed and task.done()):
                self._broken.result()
            return task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def _spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine, name=f"{self.vm}: {name}")
        self._tasks.add(task)
        return task

    async def _watch_qemu(self, qemu: Qemu) -> None:
        await qemu.gone.wait()
        if not self.state.committed:
            self._break(QemuError(f"the source's QEMU (pid {qemu.pid}) is gone"))

    # --- the control lane ---

    async def _control(self, link: AsyncLink) -> None:
        try:
            while (frame := await link.receive()) is not None:
                header, payload = frame
                message = wire.unpack_json(header.kind, payload)
                told = self._told.get(header.kind)
                if header.kind in (Kind.ABORT, Kind.PAUSED):
                    self._aborted = header.kind is Kind.ABORT
                    raise LinkError(f"{link.peer}: {message.get('reason')}")
                if told is None or told.done() or not self._expected(header.kind):
                    raise ProtocolError(f"{link.peer}: {header.kind.name} out of turn")
                told.set_result(message)
                if header.kind is Kind.COMPLETE:
                    return
            raise LinkError(f"{link.peer}: the destination closed the control lane")
        except UmemError as e:
            self._break(e)

    def _expected(self, kind: Kind) -> bool:
        if kind is Kind.PREPARED:
            return self.state is State.DEVICE
        if kind is Kind.RUNNING:
            return self.state.committed
        return self._told[Kind.RUNNING].done()

    # --- device state ---

    async def _send_device_state(self, stack: contextlib.AsyncExitStack) -> None:
        qemu = self._qemu
        assert qemu is not None
        await self._prepare_qemu(qemu, stack)
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            self.state = State.DEVICE
            self._was_running = await qemu.status() == "running"
            relay = self._spawn(self._relay(ours, qemu), "relay device state")
            await qemu.migrate_into(theirs)
        # Stopped, with all I/O drained: RAM does not change any more, and pages may be read.
        await qemu.wait_migration("pre-switchover", "device", "completed")
        self._stopped_at = qemu.stopped_at or time.monotonic()
        qemu.resumed = False
        self._go(Lane.URGENT)
        try:
            async with asyncio.timeout(_STILL_S):
                await qemu.execute("migrate-continue", state="pre-switchover")
                await qemu.wait_migration("completed")
                # Shielded: Ctrl-C must not cut a frame in two, the ABORT comes behind it.
                await asyncio.shield(relay)
                # All is out.  From here on nobody at a monitor or on a serial port can move it.
                qemu.freeze()
                await self._told[Kind.PREPARED]
        except TimeoutError:
            raise LinkError(
                f"{self._plan.destination}: has not loaded the device state after "
                f"{_STILL_S:g} s, during which {self.vm} stood still"
            ) from None

    async def _prepare_qemu(self, qemu: Qemu, stack: contextlib.AsyncExitStack) -> None:
        """Set what this migration needs; put it back at the end if QEMU is still there."""
        known = await qemu.capabilities()
        parameters = await qemu.execute("query-migrate-parameters")
        # What somebody else has switched on (multifd, return-path) would have QEMU talk to a peer
        # that is not there.
        foreign = [name for name, on in known.items() if on and name not in SOURCE_CAPABILITIES]
        before = {name: known[name] for name in (*SOURCE_CAPABILITIES, *foreign)}

        async def restore() -> None:
            if self.state.committed:
                return
            with contextlib.suppress(QemuError, TimeoutError):
                async with asyncio.timeout(_RESTORE_S):
                    await qemu.set_capabilities(before)
                    await qemu.execute(
                        "migrate-set-parameters", max_bandwidth=parameters["max-bandwidth"]
                    )

        stack.push_async_callback(restore)
        await qemu.set_capabilities(
            dict.fromkeys(SOURCE_CAPABILITIES, True) | dict.fromkeys(foreign, False)
        )
        await qemu.execute("migrate-set-parameters", max_bandwidth=UNLIMITED_BANDWIDTH)

    async def _relay(self, stream: socket.socket, qemu: Qemu) -> None:
        """Pass QEMU's stream on to the destination."""
        assert self._link is not None
        loop = asyncio.get_running_loop()
        buffer = memoryview(bytearray(_PIECE))
        try:
            with stream:
                while got := await loop.sock_recv_into(stream, buffer):
                    await self._link.send(wire.pack(Kind.DEVICE, got), buffer[:got])
                    self._device_bytes += got
            # A stream that ends early ends too: only QEMU's own word makes it whole.
            await qemu.wait_migration("completed")
            await self._link.send(wire.pack(Kind.DEVICE_END))
        except UmemError as e:
            self._break(e)
        except OSError as e:
            self._break(QemuError(f"QEMU's device state: {e.strerror}"))

    # --- the way back ---

    async def _undo(self, issued: bool, why: str) -> bool:
        """Let the destination go and make the VM run here again, if it did.

        Cannot be interrupted.  Tells whether the VM is as it was, or gone.
        """
        if self._recorded:
            runtime.commit_record(self.vm).unlink(missing_ok=True)
            self._recorded = False
        told = asyncio.create_task(self._tell_abort(why), name=f"{self.vm}: abort")
        back = True
        if issued and self._qemu is not None and not self._qemu.gone.is_set():
            back = await self._continue_vm(self._qemu)
        await told
        return back

    async def _tell_abort(self, why: str) -> None:
        """Tell the destination, and wait a little until it has heard."""
        if self._link is None or self._control_task is None:
            return
        with contextlib.suppress(UmemError, TimeoutError):
            async with asyncio.timeout(_ABORT_S):
                await self._link.send_json(Kind.ABORT, {"reason": why[:2000]})
                # It closes when it knows.  Lanes that are cut off before would be all it sees.
                await asyncio.wait({self._control_task})

    async def _continue_vm(self, qemu: Qemu) -> bool:
        problem: object = ""
        try:
            async with asyncio.timeout(_RESUME_S):
                while not qemu.gone.is_set():
                    try:
                        qemu.thaw()
                        await self._make_run(qemu)
                        return True
                    except QemuError as e:
                        # Most often a disk that the destination has not let go of yet.
                        problem = e
                        await asyncio.sleep(_POLL_S)
        except TimeoutError:
            self._tell(f"{self.vm} could not be continued within {_RESUME_S:g} s: {problem}")
            return False
        self._tell(f"{self.vm}: its QEMU is gone: {problem}")
        return True

    async def _make_run(self, qemu: Qemu) -> None:
        if (await qemu.execute("query-migrate")).get("status") in _BUSY:
            await qemu.execute("migrate_cancel")
            while (await qemu.execute("query-migrate")).get("status") in _BUSY:
                await asyncio.sleep(_POLL_S)
        if not self._was_running:
            status = await qemu.status()
            # Some QEMUs put a paused VM into postmigrate, and there is no way back but to run it.
            but = f", in state {status}: {_WHY_NOT[status]}" if status in _WHY_NOT else ""
            self._tell(f"{self.vm} is paused at the source, as it was{but}")
            return
        while (status := await qemu.status()) != "running":
            if status not in ("finish-migrate",):
                await qemu.execute("cont")
            await asyncio.sleep(_POLL_S)
        self._tell(f"{self.vm} runs on at the source")
        # The destination's QEMU announces itself when it has loaded, before it may run.
        await qemu.announce()

    # --- commit ---

    def _record_commit(self) -> None:
        """Leave word for whoever comes later that this RAM is the only copy of a VM that runs
        elsewhere.
        """
        self.report.committed_at = datetime.datetime.now(datetime.UTC).isoformat(
            timespec="milliseconds"
        )
        record = {
            "vm": self.vm,
            "session": self._session,
            "destination": str(self._plan.destination),
            "committed_at": self.report.committed_at,
            "ram": [{"id": block.id, "path": block.path} for block in self._ram],
        }
        self._recorded = True
        runtime.commit_record(self.vm).write_text(json.dumps(record, indent=1) + "\n")

    async def _after_commit(self) -> None:
        assert self._link is not None and self._qemu is not None
        sent_at = time.monotonic()
        # No await between this line and the last chance to interrupt.
        self.state = State.POSTCOPY_ACTIVE
        try:
            await self._unless_broken(self._commit(sent_at))
        except (UmemError, OSError) as e:
            if self._aborted:
                # Its word is ABORT: it had not taken COMMIT when it said so, and never will.
                self.state = State.FAILED
                if await self._undo(True, str(e)):
                    raise
            self.state = State.POSTCOPY_PAUSED
            raise LostError(
                f"COMMIT was sent to {self._plan.destination} and not answered ({e}): "
                f"{self.vm} may run there.  It stays here, frozen, with its memory.  Look there "
                f"with `umemctl status`; only if it does not run there, "
                f"`kill -CONT {self._qemu.pid}`, `cont` it (QMP: {self._qemu.path}) "
                f"and remove {runtime.commit_record(self.vm)}"
            ) from e
        try:
            # It has no right to run any more, and is not asked: it might hear a `cont` first.
            if not await self._qemu.kill():
                self._tell(f"QEMU (pid {self._qemu.pid}) does not die; it is frozen: kill it")
            complete = await self._unless_broken(self._wait_complete())
        except (UmemError, OSError) as e:
            await self._paused(str(e))
            kept = ", ".join(block.path for block in self._ram)
            raise LostError(
                f"{self.vm} runs at {self._plan.destination}, where its missing pages wait: {e}.  "
                f"Its memory is kept here: {kept}"
            ) from e
        self.state = State.COMPLETED
        take_arrival(self.report, complete)
        self.report.time_to_resident_s = round(time.monotonic() - self._stopped_at, 3)
        self._forget_ram()

    async def _commit(self, sent_at: float) -> None:
        assert self._link is not None
        await self._link.send_json(Kind.COMMIT, {"run": self._was_running})
        self._go(Lane.BACKGROUND) if self._background else None
        running = self._told[Kind.RUNNING]
        while not (await asyncio.wait({running}, timeout=_ANSWER_S))[0]:
            # It may be slow to start; to leave it now would leave the guest without its memory.
            self._tell(
                f"{self._plan.destination}: no answer to COMMIT for "
                f"{time.monotonic() - sent_at:.0f} s; waiting on"
            )
        answer = running.result()
        now = time.monotonic()
        self.report.commit_ms = round(1000 * (now - sent_at), 3)
        self.report.downtime_ms = round(1000 * (now - self._stopped_at), 3)
        how = "runs" if answer.get("running") else "stands, paused,"
        self._tell(
            f"{self.vm} {how} at {self._plan.destination} ({self.report.downtime_ms:.0f} ms)"
        )

    async def _wait_complete(self) -> dict[str, Any]:
        assert self._link is not None
        complete = await self._told[Kind.COMPLETE]
        with contextlib.suppress(LinkError):  # it has everything; goodbye is a courtesy
            await self._link.send(wire.pack(Kind.BYE))
        return complete

    async def _paused(self, reason: str) -> None:
        self.state = State.POSTCOPY_PAUSED
        if self._link is not None:
            with contextlib.suppress(UmemError, TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._link.send_json(Kind.PAUSED, {"reason": reason[:2000]})

    # --- the end ---

    def _forget_ram(self) -> None:
        """Remove the record, and RAM files that the launcher made: nobody needs them now."""
        try:
            runtime.commit_record(self.vm).unlink(missing_ok=True)
            for block in self._ram:
                runtime.remove_ram(Path(block.path))
        except OSError as e:
            self._tell(f"all is well, but {of_system(e)}: remove it")

    def _fill_report(self) -> None:
        report, progress = self.report, self.progress()
        report.state = self.state
        report.total_s = round(time.monotonic() - self._started, 3)
        report.pages_demand = progress.pages_demand
        report.pages_prefetched = self._totals(Lane.URGENT).prefetched
        report.pages_background = progress.pages_background
        report.pages_zero = progress.pages_zero
        report.device_state_bytes = self._device_bytes
        report.bytes_sent_by_lane = {"control": self._device_bytes} | {
            f"{lane.value}-{index}": worker.totals().bytes_sent
            for (lane, index), worker in self._lanes.items()
        }

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await stop_all(list(self._lanes.values()))
        if self._link is not None:
            self._link.close()
        if self._qemu is not None:
            await self._qemu.close()
        if self._claims is not None:
            self._claims.close()
        for fd in self._ram_fds:
            os.close(fd)
        if self._broken is not None:
            if self._broken.done() and not self._broken.cancelled():
                self._broken.exception()
            self._broken.cancel()
        for future in self._told.values():
            future.cancel()
