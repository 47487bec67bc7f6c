# SPDX-License-Identifier: GPL-2.0-or-later
"""The source's end of one migration: `umemctl migrate -p`.

    check   all RAM on shared files, capabilities known, nobody else migrates this VM
    setup   control lane, urgent lane, background lanes; a worker for each page lane; WELCOME on all
            of them
    device  QEMU's `migrate` into a socket of ours, relayed over the control lane.  QEMU stops in
            pre-switchover with its I/O drained: from then on RAM is still.  It saves the device
            state while the rounds, if there were any, come to their end; the destination gets it,
            and may touch memory, when it knows what is stale and the urgent lane serves
    commit  PREPARED came; the record says so; COMMIT.  One instant: before it everything can be
            undone, after it only the destination may run the VM
    serve   RUNNING came; our QEMU is ended for certain; pages flow until COMPLETE; BYE

Any trouble before the commit ends with the VM running here again.  After it: see pyumem.serving.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import secrets
import socket
import time
from collections.abc import Callable
from typing import Any, Final

from pyumem import runtime, wire
from pyumem.commit_record import CommitRecord
from pyumem.errors import (
    CheckError,
    InterruptedByUserError,
    LinkError,
    LostError,
    QemuError,
    UmemError,
    of_system,
)
from pyumem.greeting import AsyncLink
from pyumem.hello import Lane, valid_name
from pyumem.precopy import Precopy
from pyumem.process import ProcessName
from pyumem.qemu import SOURCE_CAPABILITIES, UNLIMITED_BANDWIDTH, Qemu
from pyumem.ram import PAGE_SIZE
from pyumem.report import Report, State
from pyumem.serving import BUSY, WHY_NOT, Serving, hold_ram
from pyumem.source_base import Plan
from pyumem.source_lanes import Lanes
from pyumem.wire import Kind

log = logging.getLogger(__name__)

_ABORT_S: Final = 15.0
_PIECE: Final = 32 * 1024
"""Bytes of device state in one frame: an ABORT waits for one."""
_HELD: Final = 1024
"""Pieces, at most 32 MiB, that wait until the destination may load them; with more QEMU waits."""
_STILL_S: Final = 90.0
"""Seconds that the VM may stand still before the commit; then it goes on here."""
_ANSWER_S: Final = 60.0
"""Seconds after which the destination's silence upon COMMIT is reported; it is waited for on."""
_HEAD_START_S: Final = 0.5
"""Seconds that the VM has for its start at the destination before the background lanes begin."""
_RESTORE_S: Final = 5.0
_POLL_S: Final = 0.05
_MAY_LEAVE: Final = ("running", "paused", "prelaunch")
_STATES: Final = "only a running or paused VM can leave"


def _clock(ago_s: float = 0.0) -> str:
    """Return the time of day so many seconds ago."""
    then = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=ago_s)
    return then.isoformat(timespec="milliseconds")


class Migration(Serving):
    """One migration.  run() is its life."""

    def __init__(self, plan: Plan, tell: Callable[[str], None]) -> None:
        """Take nothing yet.  tell() gets the lines that the user should see."""
        super().__init__(plan, tell, secrets.token_hex(16))
        self._task: asyncio.Task[Any] | None = None
        self._interrupted = False
        self._resuming = False
        self._part_began = 0.0

    # --- life ---

    async def run(self) -> Report:
        """Migrate.

        Returns the report.  Raises LostError after the commit; before it InterruptedByUserError or
        whatever the trouble was, with the VM running here (if it did).
        """
        self._task = asyncio.current_task()
        try:
            async with contextlib.AsyncExitStack() as stack:
                stack.push_async_callback(self._close)
                await self._until_commit(stack)
                # From here on nothing cancels this task: what it undoes it undoes as a whole.
                self._resuming = True
                await self._after_commit()
        except BaseException as e:
            self.report.error = str(e)
            raise
        finally:
            self._fill_report()
        return self.report

    def interrupt(self, why: str) -> None:
        """Answer Ctrl-C: undo before the commit; after it see Serving."""
        if self.state.committed:
            super().interrupt(why)
        elif self._resuming or self._task is None:
            self._tell(f"{why}: giving up already, {self.vm or 'the VM'} is being continued here")
        else:
            self._interrupted = True
            self._task.cancel()

    async def _until_commit(self, stack: contextlib.AsyncExitStack) -> None:
        issued = False
        try:
            await self._check(stack)
            lanes = self._new_lanes()
            await lanes.unless_broken(self._set_up(lanes))
            self.report.setup_s = round(time.monotonic() - self._started, 3)
            if self._precopy:
                self.state = State.PRECOPY_ACTIVE
                self._tell(f"{self.vm}: pre-copy begins, it runs on here")
                await lanes.unless_broken(self._precopy.run(lanes))
            issued = True
            await lanes.unless_broken(self._send_device_state(lanes, stack))
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
                raise LostError(f"{error}; and {self._not_continued()}") from e
            if error is e:
                raise
            raise error from e if isinstance(e, OSError) else None

    def _last_look(self) -> None:
        """Raise what speaks against the commit.  No await between this and the commit."""
        assert self._lanes is not None and self._qemu is not None
        if self._lanes.broken.done():
            self._lanes.broken.result()
        if self._qemu.gone.is_set() or self._qemu.cut.is_set():
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
            raise CheckError(f"VM {self.vm} is in state {status}; {WHY_NOT.get(status, _STATES)}")
        busy = await qemu.execute("query-migrate")
        if busy.get("status") in BUSY:
            raise CheckError(f"VM {self.vm} is being migrated already ({busy['status']})")
        self._was_running = status == "running"
        self._take_ram(await qemu.ram_blocks())
        runtime.make_private(runtime.migrate_dir())
        stack.enter_context(
            runtime.LockFile(
                runtime.migrate_dir() / f"{self.vm}.lock",
                f"a migration of {self.vm} runs already",
            )
        )
        self.locked = True
        if runtime.has_left(self.vm):
            raise CheckError(
                f"{runtime.commit_record(self.vm)} says that {self.vm} runs elsewhere and may need "
                f"the memory kept here: `umemctl migrate --resume --vm {self.vm}`; remove that "
                "file if it does not"
            )
        for block in self._ram:
            self._ram_fds.append(hold_ram(block))
        qemu.identify({b.id: fd for b, fd in zip(self._ram, self._ram_fds, strict=True)})
        if self._plan.precopy:
            self._take_areas(self._plan.precopy)
        else:
            self._find_pages()
        self._make_claims()

    async def _set_up(self, lanes: Lanes) -> None:
        await lanes.connect()
        lanes.follow()
        assert self._qemu is not None
        lanes.spawn(self._watch_qemu(self._qemu, lanes), "watch QEMU")
        await lanes.add_workers()

    async def _watch_qemu(self, qemu: Qemu, lanes: Lanes) -> None:
        await qemu.wait_unusable()
        if not self.state.committed:
            lanes.break_off(QemuError(f"the source's QEMU (pid {qemu.pid}) is gone"))

    # --- device state ---

    async def _send_device_state(self, lanes: Lanes, stack: contextlib.AsyncExitStack) -> None:
        qemu = self._qemu
        assert qemu is not None
        await self._prepare_qemu(qemu, stack)
        self._was_running = await qemu.status() == "running"
        self._record_departure(qemu)
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        may_load = asyncio.Event()
        may_load.set()  # what comes before the stop is but the stream's head
        with theirs:
            self.state = State.DEVICE
            relay = lanes.spawn(self._relay(lanes, ours, qemu, may_load), "relay device state")
            await qemu.migrate_into(theirs)
        # Stopped, with all I/O drained: RAM does not change any more, and pages may be read.
        await qemu.wait_migration("pre-switchover", "device", "completed")
        self._stopped_at = self._part_began = qemu.stopped_at or time.monotonic()
        self._part_ends("drain")
        if qemu.stopped_at is not None:
            self.report.stopped_at = _clock(time.monotonic() - qemu.stopped_at)
        qemu.resumed = False
        try:
            async with asyncio.timeout(_STILL_S):
                if self._precopy:
                    may_load.clear()
                else:
                    lanes.go(Lane.URGENT)
                await qemu.execute("migrate-continue", state="pre-switchover")
                if self._precopy:
                    # QEMU saves its device state meanwhile.
                    await self._end_rounds(self._precopy, lanes)
                    self._part_ends("last_round")
                    lanes.go(Lane.URGENT)
                    may_load.set()
                await qemu.wait_migration("completed")
                # Shielded: Ctrl-C must not cut a frame in two, the ABORT comes behind it.
                await asyncio.shield(relay)
                self._part_ends("device_state")
                # All is out.  From here on nobody at a monitor or on a serial port can move it.
                qemu.freeze()
                await lanes.told[Kind.PREPARED]
                self._part_ends("load")
        except TimeoutError:
            raise LinkError(
                f"{self._to}: has not loaded the device state after "
                f"{_STILL_S:g} s, during which {self.vm} stood still"
            ) from None

    def _part_ends(self, name: str) -> float:
        """Know that a part of the downtime is over; the next one begins.  Returns the time."""
        now = time.monotonic()
        self.report.downtime_parts_ms[name] = round(1000 * (now - self._part_began), 3)
        self._part_began = now
        return now

    async def _end_rounds(self, precopy: Precopy, lanes: Lanes) -> None:
        """Tell what of the rounds may be seen: all that is not stale.  The VM stands still."""
        assert self._claims is not None and lanes.link is not None
        stale = await precopy.last_reading()
        if precopy.finish_before_commit:
            await precopy.send_rest(lanes, stale)
            stale = 0
        precopy.end_lanes(lanes)
        for index, bits in enumerate(precopy.clean(stale)):
            npages = self._ram[index].size // PAGE_SIZE
            base = self._claims.slots.slot(index, 0)
            self._claims.know(base, npages, bits)
            for at in range(0, len(bits), wire.MAX_BITMAP):
                part = bits[at : at + wire.MAX_BITMAP]
                count = min(8 * len(part), npages - 8 * at)
                await lanes.link.send(wire.pack_bitmap(index, 8 * at, count, part, Kind.CLEAN))
        precopy.known.remaining_pages = stale.bit_count()
        self._count_anew(self._claims.claimed())

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

    async def _relay(
        self, lanes: Lanes, stream: socket.socket, qemu: Qemu, may_load: asyncio.Event
    ) -> None:
        """Pass QEMU's stream on to the destination, which loads what it gets: it may touch memory.
        What comes before it may is held.
        """
        assert lanes.link is not None
        loop = asyncio.get_running_loop()
        buffer = memoryview(bytearray(_PIECE))
        held: list[bytes] = []
        try:
            with stream:
                while got := await loop.sock_recv_into(stream, buffer):
                    if not may_load.is_set() and len(held) < _HELD:
                        held.append(bytes(buffer[:got]))
                        continue
                    await self._send_held(lanes.link, held, may_load)
                    await self._send_device(lanes.link, buffer[:got])
            await self._send_held(lanes.link, held, may_load)
            # A stream that ends early ends too: only QEMU's own word makes it whole.
            await qemu.wait_migration("completed")
            await lanes.link.send(wire.pack(Kind.DEVICE_END))
        except UmemError as e:
            lanes.break_off(e)
        except OSError as e:
            lanes.break_off(QemuError(f"QEMU's device state: {e.strerror}"))

    async def _send_held(self, link: AsyncLink, held: list[bytes], may_load: asyncio.Event) -> None:
        await may_load.wait()
        for piece in held:
            await self._send_device(link, piece)
        held.clear()

    async def _send_device(self, link: AsyncLink, piece: bytes | memoryview) -> None:
        await link.send(wire.pack(Kind.DEVICE, len(piece)), piece)
        self._device_bytes += len(piece)

    # --- the way back ---

    async def _undo(self, issued: bool, why: str) -> bool:
        """Let the destination go and make the VM run here again, if it did.

        Cannot be interrupted.  Tells whether the VM is as it was, or gone.
        """
        told = asyncio.create_task(self._tell_abort(why), name=f"{self.vm}: abort")
        back = await self._continue_here() if issued else True
        await told
        return back

    async def _tell_abort(self, why: str) -> None:
        """Tell the destination, and wait a little until it has heard."""
        lanes = self._lanes
        if lanes is None or lanes.link is None or lanes.control is None:
            return
        with contextlib.suppress(UmemError, TimeoutError):
            async with asyncio.timeout(_ABORT_S):
                await lanes.link.send_json(Kind.ABORT, {"reason": why[:2000]})
                # It closes when it knows.  Lanes that are cut off before would be all it sees.
                await asyncio.wait({lanes.control})

    # --- commit ---

    def _record_departure(self, qemu: Qemu) -> None:
        """Leave word that QEMU may be found stopped, or frozen, and is to go on here."""
        record = CommitRecord(
            vm=self.vm,
            session=self._session_id,
            destination=str(self._to),
            committed=False,
            committed_at="",
            answered=False,
            was_running=self._was_running,
            background_lanes=self._plan.background_lanes,
            qmp=str(qemu.path),
            qemu=ProcessName.of(qemu.pid),
            ram=tuple(self._ram),
        )
        self._record = record  # before it is there: half a record is removed, too
        record.write()

    def _record_commit(self) -> None:
        """Leave word that this RAM is the only copy of a VM that runs elsewhere."""
        assert self._record is not None
        self.report.committed_at = now = _clock()
        self._record = self._record.commit(now)

    async def _after_commit(self) -> None:
        assert self._lanes is not None
        lanes, sent_at = self._lanes, time.monotonic()
        # No await between this line and the last chance to interrupt.
        self.state = State.POSTCOPY_ACTIVE
        await self._until_complete(self._commit_and_serve(lanes, sent_at))

    async def _commit_and_serve(self, lanes: Lanes, sent_at: float) -> dict[str, Any]:
        """Serve on the lanes that the VM went through.  Returns what COMPLETE said."""
        self._up_at = sent_at
        try:
            await lanes.unless_broken(self._commit(lanes, sent_at), result_counts=True)
        except (UmemError, OSError) as e:
            if lanes.aborted and not lanes.told[Kind.RUNNING].done():
                # Its word is ABORT: it had not taken COMMIT when it said so, and never will.
                self.state = State.FAILED
                if not await self._undo(True, str(e)):
                    raise LostError(f"{e}; and {self._not_continued()}") from e
            raise
        await self._is_there()
        return await lanes.unless_broken(self._wait_complete(lanes), result_counts=True)

    async def _commit(self, lanes: Lanes, sent_at: float) -> None:
        assert lanes.link is not None
        await lanes.link.send_json(Kind.COMMIT, {"run": self._was_running})
        lanes.committed(background=self._background)
        running = lanes.told[Kind.RUNNING]
        # What the start takes is downtime: link and processors are its own for that long.  It may
        # wait for pages itself, so not for ever.
        await asyncio.wait({running}, timeout=_HEAD_START_S)
        if self._background:
            lanes.go(Lane.BACKGROUND)
        while not (await asyncio.wait({running}, timeout=_ANSWER_S))[0]:
            # It may be slow to start; to leave it now would leave the guest without its memory.
            self._tell(
                f"{self._to}: no answer to COMMIT for "
                f"{time.monotonic() - sent_at:.0f} s; waiting on"
            )
        answer = running.result()
        now = self._part_ends("commit")
        self.report.commit_ms = round(1000 * (now - sent_at), 3)
        self.report.downtime_ms = round(1000 * (now - self._stopped_at), 3)
        how = "runs" if answer.get("running") else "stands, paused,"
        self._tell(f"{self.vm} {how} at {self._to} ({self.report.downtime_ms:.0f} ms)")
