# SPDX-License-Identifier: GPL-2.0-or-later
"""The source after the commit: it serves pages until the destination has them all, through as many
connections as that takes.

    postcopy-active   pages flow
    postcopy-paused   a connection, a worker or the peer's daemon was lost; the guest runs on where
                      its pages are.  Tried again by itself, ever less often, and at once when
                      `umemctl recover` says so, perhaps at another address
    postcopy-recover  connected again; the destination says what it has (pyumem.recovery)
    completed         it has everything, or its guest has ended

Nothing that matters is in this process alone: the commit record and the RAM file outlive it, and
Resumed takes up from them what another `umemctl migrate` left.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import stat
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from pyumem import runtime, wire
from pyumem.address import Address
from pyumem.areafs import is_area_file
from pyumem.claims import ClaimMap
from pyumem.commit_record import CommitRecord
from pyumem.errors import CheckError, LinkError, LostError, QemuError, UmemError, of_system
from pyumem.hello import AreaSpec, Lane
from pyumem.qemu import Qemu, RamBlock
from pyumem.ram import PAGE_SIZE
from pyumem.recovery import Fate, Verdict, hear_have, hear_verdict
from pyumem.report import Report, State, take_arrival
from pyumem.source_base import Plan, SourceBase
from pyumem.source_lanes import Lanes
from pyumem.wire import Kind

_RESUME_S: Final = 30.0
_FENCE_S: Final = 10.0
_LAUNCHER_S: Final = 3.0
_POLL_S: Final = 0.05
_RECOVER_S: Final = 60.0
"""Seconds within which a connection has to be back in service, or it is tried again."""
_FIRST_RETRY_S: Final = 0.25
_LAST_RETRY_S: Final = 10.0
_LASTING_S: Final = 20.0
"""Seconds after which a connection that is lost again counts as one that had been good."""
WHY_NOT: Final = {
    "postmigrate": "QEMU lets it leave again after `cont` at its monitor (and `stop`, if it is to "
    "be paused)",
}
BUSY: Final = ("setup", "active", "pre-switchover", "device", "cancelling", "wait-unplug")


def hold_ram(block: RamBlock) -> int:
    """Open a RAM block's file and say by a lock that it is served.  Raises CheckError."""
    try:
        fd = os.open(block.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as e:
        raise CheckError(f"RAM block {block.id}: {block.path}: {e.strerror}") from e
    # The launcher looks at this when its QEMU ends: we remove the file then, not it.
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise CheckError(f"RAM block {block.id}: {block.path} is locked") from None
    return fd


class Serving(SourceBase):
    """From COMMIT to the end."""

    def __init__(self, plan: Plan, tell: Callable[[str], None], session: str) -> None:
        """See SourceBase."""
        super().__init__(plan, tell, session)
        self._record: CommitRecord | None = None
        self._again = asyncio.Event()
        self._leave = ""
        self._retry_s = _FIRST_RETRY_S
        self._up_at = 0.0

    # --- what may be said to it ---

    def interrupt(self, why: str) -> None:
        """Answer Ctrl-C: no while pages flow; while they do not, leave them to a later --resume."""
        if self.state in (State.POSTCOPY_PAUSED, State.POSTCOPY_RECOVER):
            self._leave = why
            self._again.set()
            if self.state is State.POSTCOPY_RECOVER and self._lanes is not None:
                self._lanes.break_off(LinkError(why))  # an attempt that may take its time
        else:
            self._tell(
                f"{why}: not stopping: {self.vm} runs at {self._to} and needs "
                "its memory from here until every page is there"
            )

    def recover(self, to: Address | None = None) -> None:
        """Connect anew, now, and from now on to another address if one is given.

        Raises UmemError before the commit and at the end.
        """
        if not self.state.committed or self.state.over:
            raise UmemError(f"{self.vm} is {self.state}: there is nothing to recover")
        self._to = to or self._to
        self._retry_s = _FIRST_RETRY_S
        self._again.set()
        if self._lanes is not None:
            self._lanes.break_off(LinkError("a new connection was asked for"))

    # --- the loop ---

    async def _until_complete(self, work: Coroutine[Any, Any, dict[str, Any]]) -> None:
        """Do the work, and as long as it fails, take the migration up again.

        Raises LostError when that is left to the user, and whatever the trouble was when the VM
        turned out to be ours again.
        """
        while True:
            try:
                told = await work
                break
            except LostError:
                if self.state.committed:
                    self.state = State.POSTCOPY_PAUSED
                raise
            except (UmemError, OSError) as e:
                if not self.state.committed:
                    raise
                await self._pause(str(e))
                work = self._take_up()
        await self._end_qemu()
        await self._launcher_knows()
        self.state = State.COMPLETED
        take_arrival(self.report, told)
        if self._stopped_at:
            self.report.time_to_resident_s = round(time.monotonic() - self._stopped_at, 3)
        self._forget_ram()
        # Not before: who has said goodbye is told nothing any more.
        if self._lanes is not None and self._lanes.link is not None:
            with contextlib.suppress(LinkError):  # it has everything; goodbye is a courtesy
                await self._lanes.link.send(wire.pack(Kind.BYE))

    async def _pause(self, reason: str) -> None:
        self.state = State.POSTCOPY_PAUSED
        if self._lanes is not None and self._lanes.link is not None:
            with contextlib.suppress(UmemError, TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._lanes.link.send_json(Kind.PAUSED, {"reason": reason[:2000]})
        await self._drop_lanes()
        if time.monotonic() - self._up_at > _LASTING_S:
            self._retry_s = _FIRST_RETRY_S
        self._tell(
            f"{self.vm}: postcopy-paused: {reason}; its missing pages wait here, connecting anew"
        )

    async def _take_up(self) -> dict[str, Any]:
        """Connect until it works, then serve.  Returns what COMPLETE said."""
        said = ""
        if self._retry_s > _FIRST_RETRY_S:
            # The connection before this one did not last.
            await self._wait_a_little()
        while True:
            self._look_for_leave()
            self._again.clear()
            try:
                async with asyncio.timeout(_RECOVER_S):
                    verdict = await self._connect_again()
                if verdict.fate is not Fate.HERE:
                    return await self._settle(verdict)
                break
            except LostError:
                raise
            except (UmemError, OSError) as e:
                if not self.state.committed:
                    raise
                problem = str(e) or f"not in service within {_RECOVER_S:g} s"
            self.state = State.POSTCOPY_PAUSED
            await self._drop_lanes()
            if problem != said:
                self._tell(f"{self.vm}: not yet: {problem}; tried again and again")
                said = problem
            await self._wait_a_little()
        assert self._lanes is not None
        return await self._lanes.unless_broken(self._wait_complete(self._lanes), result_counts=True)

    async def _wait_a_little(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._retry_s):
                await self._again.wait()
        self._retry_s = min(2 * self._retry_s, _LAST_RETRY_S)

    def _look_for_leave(self) -> None:
        if self._leave:
            raise LostError(
                f"{self._leave}: {self.vm} runs at {self._to}, where its missing pages wait.  Its "
                f"memory is kept here: {self._kept()}; take it up again with "
                f"`umemctl migrate --resume --vm {self.vm}`"
            )

    async def _connect_again(self) -> Verdict:
        """Have all lanes back in service.  Returns what the destination says; if that is not that
        the VM is there and lacks pages, nothing more was done.
        """
        assert self._claims is not None
        self.state = State.POSTCOPY_RECOVER
        lanes = self._new_lanes()
        verdict = await lanes.unless_broken(self._ask(lanes, self._claims))
        if verdict.fate is not Fate.HERE:
            return verdict
        lanes.follow()
        lanes.committed(background=self._background)
        await lanes.unless_broken(lanes.add_workers())
        await self._is_there()
        if self._background and lanes.background_lost:
            raise LinkError("the background lanes were lost at once")
        self.state = State.POSTCOPY_ACTIVE
        self._leave = ""
        self.report.recoveries += 1
        self._up_at = time.monotonic()
        self._retry_s = min(2 * self._retry_s, _LAST_RETRY_S)
        lanes.go(Lane.URGENT)
        if self._background:
            lanes.go(Lane.BACKGROUND)
        self._tell(f"{self.vm}: connected to {self._to} again, pages flow")
        return verdict

    async def _ask(self, lanes: Lanes, claims: ClaimMap) -> Verdict:
        """Connect the control lane and hear what became of the VM, and what of it is there."""
        link = await lanes.connect(resume=True)
        verdict = await hear_verdict(link)
        if verdict.fate is Fate.HERE:
            specs = [AreaSpec(block.id, block.size, PAGE_SIZE) for block in self._ram]
            await hear_have(link, specs, claims)
            self._count_anew(claims.claimed())
        return verdict

    async def _is_there(self) -> None:
        """Know that the destination has the VM, and make sure that it runs nowhere else."""
        assert self._record is not None
        if not self._record.answered or self._record.address != self._to:
            try:
                self._record = self._record.answer(self._to)
            except UmemError as e:
                # Pages flow first.  A later --resume that does not know it asks, and is told.
                self._tell(f"{self.vm}: {e}")
                self._record = replace(self._record, answered=True, destination=str(self._to))
        if not self._lives_with_qemu():
            await self._end_qemu()

    def _lives_with_qemu(self) -> bool:
        """Tell whether some of the RAM is an area of the driver.

        It lives as long as somebody has it open: QEMU, frozen as it is, keeps it should this
        process be killed, and is ended with the migration.
        """
        found = [os.fstat(fd) for fd in self._ram_fds]
        return any(stat.S_ISCHR(one.st_mode) or is_area_file(one) for one in found)

    async def _end_qemu(self) -> None:
        # It has no right to run any more, and is not asked: it might hear a `cont` first.
        assert self._record is not None
        if not await self._record.qemu.kill(_FENCE_S):
            pid = self._record.qemu.pid
            self._tell(f"QEMU (pid {pid}) does not die; it is frozen: kill it")

    async def _wait_complete(self, lanes: Lanes) -> dict[str, Any]:
        return await lanes.told[Kind.COMPLETE]

    # --- an end that came while nobody listened ---

    async def _settle(self, verdict: Verdict) -> dict[str, Any]:
        """Do what the destination's last word demands.

        Returns what COMPLETE would have said.  Raises LostError, or UmemError when the VM runs
        here again.
        """
        assert self._record is not None
        match verdict.fate:
            case Fate.COMPLETE:
                await self._is_there()
                return {}
            case Fate.ENDED:
                await self._is_there()
                return {"guest_ended": verdict.reason or "ended"}
            case Fate.ABORTED if not self._record.answered:
                self.state = State.FAILED
                if await self._continue_here():
                    raise UmemError(f"{self._to} never got COMMIT: {verdict.reason}")
                raise LostError(f"{self._to} never got COMMIT, and {self._not_continued()}")
            case fate:
                raise LostError(
                    f"{self.vm}: {self._to} says {fate.value}: {verdict.reason}.  Its memory is "
                    f"kept here: {self._kept()}; remove {self._record.path} when it is of no use"
                )

    def _kept(self) -> str:
        return ", ".join(block.path for block in self._ram)

    # --- the way back ---

    async def _continue_here(self) -> bool:
        """Make the VM run here again, if it did, since it is ours alone.

        Tells whether it is as it was, or gone.
        """
        if self._record is not None:
            # Should this process be killed before it runs again: --resume goes on from this.
            self._record = self._record.stay()
            if self._qemu is None:
                try:
                    if not self._record.qemu.signal(signal.SIGCONT):
                        # Another one of that name, at the same socket, is none of ours.
                        self._tell(f"{self.vm}: its QEMU (pid {self._record.qemu.pid}) is gone")
                        self._record.remove()
                        self._record = None
                        return True
                    self._qemu = await Qemu.connect(Path(self._record.qmp))
                    blocks = zip(self._ram, self._ram_fds, strict=True)
                    self._qemu.identify({block.id: fd for block, fd in blocks})
                except UmemError as e:
                    self._tell(f"{self.vm}: its QEMU: {e}")
                    return False
        back = self._qemu is None or self._qemu.gone.is_set() or await self._continue_vm(self._qemu)
        if back and self._record is not None:
            self._record.remove()
            self._record = None
        return back

    def _not_continued(self) -> str:
        return (
            f"{self.vm} could not be continued here; `umemctl migrate --resume --vm {self.vm}` "
            "tries it again"
        )

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
        if (await qemu.execute("query-migrate")).get("status") in BUSY:
            await qemu.execute("migrate_cancel")
            while (await qemu.execute("query-migrate")).get("status") in BUSY:
                await asyncio.sleep(_POLL_S)
        if not self._was_running:
            status = await qemu.status()
            # Some QEMUs put a paused VM into postmigrate, and there is no way back but to run it.
            but = f", in state {status}: {WHY_NOT[status]}" if status in WHY_NOT else ""
            self._tell(f"{self.vm} is paused at the source, as it was{but}")
            return
        while (status := await qemu.status()) != "running":
            if status not in ("finish-migrate",):
                await qemu.execute("cont")
            await asyncio.sleep(_POLL_S)
        self._tell(f"{self.vm} runs on at the source")
        # The destination's QEMU announces itself when it has loaded, before it may run.
        await qemu.announce()

    # --- the end ---

    async def _launcher_knows(self) -> None:
        """Wait until the launcher, if there is one, has seen its QEMU's end beside the record that
        explains it.
        """
        deadline = time.monotonic() + _LAUNCHER_S
        while time.monotonic() < deadline:
            try:
                with runtime.vm_lock(self.vm).open("rb") as lock:
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                await asyncio.sleep(_POLL_S)
            except OSError:
                return  # it was not started by a launcher

    def _forget_ram(self) -> None:
        """Remove the record, and RAM files that the launcher made: nobody needs them now."""
        try:
            if self._record is not None:
                self._record.remove()
            for block in self._ram:
                runtime.remove_ram(Path(block.path))
        except OSError as e:
            self._tell(f"all is well, but {of_system(e)}: remove it")


class Resumed(Serving):
    """A migration that another process began, and committed."""

    def __init__(self, plan: Plan, record: CommitRecord, tell: Callable[[str], None]) -> None:
        """Take nothing yet.  Of the plan's lanes there are as many as there were."""
        super().__init__(plan, tell, record.session)
        self._record = record
        self._was_running = record.was_running
        self.vm = self.report.vm = record.vm
        self.state = State.POSTCOPY_PAUSED
        self.report.committed_at = record.committed_at

    async def _stay(self) -> None:
        """Have a VM go on here whose `umemctl migrate` was killed before the commit."""
        if not await self._continue_here():
            raise LostError(f"{self.vm} never left, and {self._not_continued()}")
        raise UmemError(f"{self.vm} never left: its migration was killed before the commit")

    async def run(self) -> Report:
        """Serve until the end.

        Returns the report.  Raises CheckError when another process does it already, LostError,
        UmemError.
        """
        assert self._record is not None
        try:
            async with contextlib.AsyncExitStack() as stack:
                stack.push_async_callback(self._close)
                stack.enter_context(
                    runtime.LockFile(
                        runtime.migrate_dir() / f"{self.vm}.lock",
                        f"a migration of {self.vm} runs already",
                    )
                )
                # Read again: whoever had the lock may have finished since.
                self._record = CommitRecord.read(self.vm)
                self.locked = True
                self._take_ram(list(self._record.ram))
                for block in self._ram:
                    self._ram_fds.append(hold_ram(block))
                self._make_claims()
                if not self._record.committed:
                    self.state = State.FAILED
                    await self._stay()
                self._find_pages()
                await self._until_complete(self._take_up())
        except BaseException as e:
            self.report.error = str(e)
            raise
        finally:
            self._fill_report()
        return self.report
