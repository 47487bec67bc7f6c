# SPDX-License-Identifier: GPL-2.0-or-later
"""The destination's end of one migration: lanes, device state, the commit, completeness.

    SETUP            HELLO on the control lane; each page lane gets a worker and then its WELCOME
    DEVICE           DEVICE frames go into QEMU's incoming socket; pages flow already, since loading
                     touches RAM
                     QEMU has loaded everything: PREPARED; nothing runs here yet
    POSTCOPY_ACTIVE  COMMIT came: `cont`, RUNNING; the source ends its QEMU
                     every granule of every area is cached: COMPLETE; BYE: COMPLETED

Before COMMIT any trouble ends in FAILED and the VM goes on at the source.  After it trouble ends in
POSTCOPY_PAUSED: the guest waits for its missing pages, which are never made up.  A source that
comes back gets a new Migration object, resumed from the old one:

    POSTCOPY_RECOVER VERDICT and HAVE went out; lanes are being connected
    POSTCOPY_ACTIVE  all of them are there
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from pyumem import wire
from pyumem.area import Area
from pyumem.arrival import ArrivalReport, DriverCounts, bytes_by_lane, latencies, prefetched
from pyumem.claims import Slots
from pyumem.compression import accept, directory
from pyumem.errors import LinkError, ProtocolError, QemuError, RefusedError, UmemError
from pyumem.greeting import AsyncLink, refuse, welcome
from pyumem.heartbeat import beat
from pyumem.hello import Hello, Lane, flag
from pyumem.lanes.fill import BUFFER_SIZE, Arrivals
from pyumem.lanes.link import tune
from pyumem.lanes.room import Room, groups_of
from pyumem.qemu import Qemu
from pyumem.recovery import Fate, Verdict, tell_have
from pyumem.release import CONFIRM_S, runs
from pyumem.report import Progress, State, arrival_report, totals_of
from pyumem.stats import StatsBlock, Totals
from pyumem.tls import LaneSecurity
from pyumem.wire import Kind
from pyumem.workers import Worker, stop_all

log = logging.getLogger(__name__)

_POLL_S: Final = 0.02
"""Seconds between two looks at how much is cached."""
_BYE_S: Final = 10.0
_MEMORY_LOOK_S: Final = 1.0
"""Seconds between two looks whether the lanes wait for memory: longer than one wait of theirs."""
_ROUNDS_S: Final = 60.0


class Phase(StrEnum):
    """How far a VM is here: what a daemon that was killed has to know of it."""

    PREPARED = "prepared"  # nothing runs here yet; the source may believe that it does
    COMMITTED = "committed"  # it is ours
    COMMITTED_RUN = "committed-run"  # it is ours, and is to run
    STARTED = "started"  # it does what it is to do


@dataclass(frozen=True, slots=True)
class Target:
    """What a migration comes to: a QEMU that waits, and its areas in the order of HELLO."""

    name: str
    areas: Sequence[Area]
    qemu: Qemu
    incoming: Path
    autostart: bool
    touch: bool
    on_phase: Callable[[Phase], None]
    """Called before PREPARED is said, and in the instant of the commit.  What it raises ends the
    migration, before the commit.
    """
    started: asyncio.Event
    """Set, after the commit, when it runs, or stands, as the source wanted it."""


class _AbortedError(UmemError):
    """The source gave up, before the commit."""


class Migration:
    """One migration.  run() is its life; close() frees what it holds."""

    def __init__(
        self,
        target: Target,
        hello: Hello,
        link: AsyncLink,
        lanes: LaneSecurity,
        *,
        before: Migration | None = None,
        resumed: bool = False,
    ) -> None:
        """Begin, after the control lane's HELLO was checked.

        resumed: it was committed before, and is taken up again; before is what it was then, closed,
        if this process knows it.
        """
        self._target = target
        self._resumed = resumed
        self.recoveries: int = before.recoveries if before else 0
        self._past = before.by_lane() if before else {}
        self.hello: Final = hello
        self.lanes: Final = lanes
        self._link = link
        self.state = State.POSTCOPY_RECOVER if resumed else State.SETUP
        self.reason = ""
        self._started: float = before._started if before else time.monotonic()
        self._committed_at: float | None = before._committed_at if before else None
        self._resident_at: float | None = None
        self._arrivals = Arrivals.create(Slots([area.npages for area in target.areas]))
        self._lanes: dict[tuple[Lane, int], Worker | None] = {}
        self._broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._stream: socket.socket | None = None
        self._device_bytes: int = before._device_bytes if before else 0
        self._loading = resumed
        self.prepared = resumed
        """PREPARED was said, or was about to be."""
        self.unconfirmed = False
        """It is complete, and the source may not know."""
        self.guest_ended = ""
        self.starved = ""
        """What there is too little of for more pages, while the lanes wait for it."""
        self._complete = False
        self._clean = len(target.areas) if resumed else 0
        """Areas of which CLEAN was said."""
        self._clean_pgoff = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self._driver = DriverCounts()
        self._starting: set[Worker] = set()
        self._none_starts = asyncio.Event()
        self._none_starts.set()
        self._uncounted = 0
        if resumed:
            here = sum(
                self._arrivals.know(
                    self._arrivals.slots.slot(index, 0), area.npages, area.page_bitmap()
                )
                for index, area in enumerate(target.areas)
            )
            self._uncounted = here - self.progress().pages_done

    # --- what is known ---

    @property
    def peer(self) -> str:
        """Return the source's address."""
        return self._link.peer

    def by_lane(self) -> dict[str, Totals]:
        """Return what came on each lane, in all its lives that this process has seen."""
        found = dict(self._past)
        for (lane, index), worker in self._lanes.items():
            if worker:
                name = f"{lane.value}-{index}"
                found[name] = found.get(name, Totals()) + worker.totals()
        return found

    def _totals(self, lane: Lane) -> Totals:
        return totals_of(t for name, t in self.by_lane().items() if name.startswith(lane))

    def progress(self) -> Progress:
        """Return how far it is."""
        urgent, background = self._totals(Lane.URGENT), self._totals(Lane.BACKGROUND)
        rounds = self._totals(Lane.PRECOPY)
        return Progress(
            state=self.state,
            pages_total=self._arrivals.slots.total,
            pages_demand=urgent.pages,
            pages_background=background.pages,
            pages_zero=urgent.zero_pages + background.zero_pages,
            pages_uncounted=self._uncounted,
            bytes_moved=urgent.bytes_received + background.bytes_received + rounds.bytes_received,
            elapsed_s=round(time.monotonic() - self._started, 3),
        )

    def to_json(self) -> dict[str, Any]:
        """Return what status shows."""
        urgent, background = self._totals(Lane.URGENT), self._totals(Lane.BACKGROUND)
        return {
            "state": self.state.value,
            "reason": self.starved or self.reason,
            "peer": self.peer,
            "source_vm": self.hello.vm,
            "session": self.hello.session,
            "recoveries": self.recoveries,
            **self.progress().to_json(),
            **arrival_report(urgent, background),
            **self._driver_counts().to_json(),
            "bytes_received_by_lane": self._bytes_by_lane(),
            "workers": [
                {"lane": f"{lane.value}-{index}", "pid": worker.pid if worker else 0}
                for (lane, index), worker in self._lanes.items()
            ],
        }

    def _driver_counts(self) -> DriverCounts:
        """Return the driver's, after close() those of then: the areas may be closed, too."""
        if not self._closed:
            self._driver = DriverCounts.of(self._target.areas)
        return self._driver

    def _bytes_by_lane(self) -> dict[str, int]:
        return {"control": self._device_bytes} | bytes_by_lane(self.by_lane())

    def report(self) -> ArrivalReport:
        """Return what there is to tell, before free()."""
        progress, lanes = self.progress(), self.by_lane()
        to_resident = None
        if self._committed_at is not None and self._resident_at is not None:
            to_resident = round(self._resident_at - self._committed_at, 3)
        return ArrivalReport(
            vm=self._target.name,
            source_vm=self.hello.vm,
            peer=self.peer,
            session=self.hello.session,
            state=self.state,
            error=self.reason,
            guest_ended=self.guest_ended,
            total_s=progress.elapsed_s,
            time_to_resident_s=to_resident,
            ram_bytes=sum(area.size for area in self._target.areas),
            pages_total=progress.pages_total,
            pages_demand=progress.pages_demand,
            pages_background=progress.pages_background,
            pages_zero=progress.pages_zero,
            pages_prefetched=prefetched(self._totals(Lane.URGENT)),
            pages_uncounted=progress.pages_uncounted,
            requests=self._totals(Lane.URGENT).requests,
            memory_waits=latencies(lanes).memory_waits,
            driver=self._driver_counts(),
            latencies=latencies(lanes),
            bytes_received_by_lane=self._bytes_by_lane(),
            recoveries=self.recoveries,
        )

    # --- lanes ---

    async def add_lane(self, hello: Hello, link: AsyncLink) -> None:
        """Take a page lane: start its worker, hand it the socket, say WELCOME.

        Raises RefusedError (the peer was told), WorkerError, LinkError; the migration goes on, or
        fails, on its own account.
        """
        key = (hello.lane, hello.index)
        if problem := self._lane_problem(hello):
            await refuse(link, problem)
            raise RefusedError(f"{link.peer}: {problem}")
        self._lanes[key] = None  # taken from here on, though its worker is only starting
        name = f"{hello.lane.value} lane {hello.index} of {self._target.name}"
        worker = Worker(name, StatsBlock.create(name), self._worker_failed)
        compression = accept(hello)
        module = f"destination_{hello.lane.value}"
        with contextlib.closing(link.detach()) as sock:
            tune(sock, urgent=hello.lane is Lane.URGENT)
            fds = [sock.fileno(), *self._arrivals.fds]
            for area in self._target.areas:
                fds += [area.server_fd, area.shmem_fd]
            self._starting.add(worker)
            self._none_starts.clear()
            try:
                message = {
                    "peer": link.peer,
                    "touch": self._target.touch,
                    "resumed": self._resumed,
                    "untouched": not (self._resumed or self.hello.precopy_lanes),
                    "qemu_pid": self._target.qemu.pid,
                    "tls": self.lanes.to_json(),
                    "compression": directory() if compression else "",
                }
                await worker.start(module, message, fds)
                self._lanes[key] = worker
                greeter = AsyncLink(sock, link.peer)
                await welcome(greeter, self.lanes.token, hello, compression=compression)
                sock.setblocking(True)
                if self._closed or self._broken.done():
                    raise LinkError(f"{link.peer}: {name} came too late")
            except BaseException as e:
                self._lanes[key] = None
                await worker.stop()
                worker.close()
                if isinstance(e, UmemError):
                    self._break(e)
                raise
            finally:
                self._starting.discard(worker)
                if not self._starting:
                    self._none_starts.set()
        worker.command("go")
        if self.state is State.POSTCOPY_RECOVER and not self._missing_lanes:
            self.state = State.POSTCOPY_ACTIVE
            self.recoveries += 1
            log.info("%s: the source is back, pages flow", self._target.name)
            self._spawn(self._watch_complete(), "watch completeness")

    @property
    def _missing_lanes(self) -> int:
        announced = 1 + self.hello.background_lanes
        if not self._resumed:
            announced += self.hello.precopy_lanes
        return announced - sum(map(bool, self._lanes.values()))

    def _lane_problem(self, hello: Hello) -> str:
        if hello.session != self.hello.session:
            return f"session {hello.session} is not known here"
        if self.state not in (State.SETUP, State.POSTCOPY_RECOVER):
            return f"the migration is past its setup ({self.state})"
        if hello.lane is Lane.URGENT and hello.index:
            return "there is one urgent lane"
        if hello.lane is Lane.BACKGROUND and hello.index >= self.hello.background_lanes:
            return f"background lane {hello.index}, {self.hello.background_lanes} were announced"
        if hello.lane is Lane.PRECOPY and (
            self._resumed or hello.index >= self.hello.precopy_lanes
        ):
            return f"pre-copy lane {hello.index}, {self.hello.precopy_lanes} were announced"
        if (hello.lane, hello.index) in self._lanes:
            return f"there is a {hello.lane} lane {hello.index} already"
        return ""

    def _worker_failed(self, worker: Worker, reason: str) -> None:
        if worker.drained:
            return  # its lane had said END: nothing is lost with it
        self._break(LinkError(reason))

    def give_up(self, reason: str) -> None:
        """End it on this side's wish; before the commit only, after it the guest depends on it."""
        if not self.state.committed:
            self._break(UmemError(reason))

    def cut(self, reason: str) -> None:
        """Have it end as if its connection had been lost: it was, and nobody noticed yet."""
        self._break(LinkError(reason))

    def _break(self, error: UmemError) -> None:
        if not self._broken.done():
            self._broken.set_exception(error)

    # --- life ---

    async def run(self) -> None:
        """Follow the control lane to the end.

        Never raises for what a peer or QEMU does: see state and reason.
        """
        self._spawn(self._watch_qemu(), "watch QEMU")
        self._spawn(self._watch_memory(), "watch memory")
        control = self._spawn(self._converse(), "control lane")
        try:
            await asyncio.wait({control, self._broken}, return_when=asyncio.FIRST_COMPLETED)
            if self._broken.done():
                self._broken.result()
            control.result()
            self.state = State.COMPLETED
        except (UmemError, OSError) as e:
            await self._failed(e)
        finally:
            await self._end_tasks()
            if not self._broken.done():
                self._broken.cancel()

    async def _converse(self) -> None:
        if self._resumed:
            await self._link.send_json(Kind.VERDICT, Verdict(Fate.HERE).to_json())
            await tell_have(self._link, self._target.areas)
            self._spawn(self._beat(), "heartbeat")
        await self._control()

    async def _beat(self) -> None:
        try:
            await beat(self._link)
        except LinkError as e:
            self._break(e)

    async def _failed(self, error: Exception) -> None:
        if self._complete:
            self.unconfirmed = True
            # All is here.  That the source did not say goodbye is its affair.
            log.warning(
                "%s: complete, but the source did not confirm: %s", self._target.name, error
            )
            self.state = State.COMPLETED
            return
        self.reason = str(error)
        told = Kind.PAUSED if self.state.committed else Kind.ABORT
        if self.state.committed:
            self.state = State.POSTCOPY_PAUSED
        else:
            self.state = State.CANCELLED if isinstance(error, _AbortedError) else State.FAILED
        if not isinstance(error, _AbortedError):
            with contextlib.suppress(LinkError, TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._link.send_json(told, {"reason": self.reason[:2000]})

    def _spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(
            coroutine, name=f"{self._target.name}: {name}"
        )
        self._tasks.add(task)
        return task

    async def _end_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()

    def arrived_after_all(self) -> bool:
        """In postcopy-paused: look whether what was still in the lanes has made it complete."""
        if all(area.info().complete for area in self._target.areas):
            self.state = State.COMPLETED
            self._resident_at = time.monotonic()
            self.unconfirmed = True
            return True
        return False

    async def close(self) -> None:
        """Stop the workers, close the lanes; again is harmless."""
        self._closed = True
        await self._end_tasks()
        # One that is only starting has the memory that free() unmaps; it ends, seeing _closed.
        await stop_all(list(self._starting))
        await self._none_starts.wait()
        await stop_all([worker for worker in self._lanes.values() if worker])
        self._link.close()
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        self._driver = DriverCounts.of(self._target.areas)

    def free(self) -> None:
        """Unmap what is shared with the workers, after close(), when nobody will ask for numbers
        any more.
        """
        for worker in self._lanes.values():
            if worker:
                worker.close()
        self._lanes.clear()
        self._arrivals.close()

    async def _watch_qemu(self) -> None:
        qemu = self._target.qemu
        await qemu.gone.wait()
        if qemu.shutdown_reason and self.state is State.POSTCOPY_ACTIVE:
            # The guest powered off before it had all its memory.  Nobody needs the rest.
            log.info("%s: the VM ended (%s)", self._target.name, qemu.shutdown_reason)
            self.guest_ended = qemu.shutdown_reason
            await self._tell_complete({"guest_ended": qemu.shutdown_reason})
            return
        self._break(QemuError(f"the destination's QEMU (pid {qemu.pid}) is gone"))

    async def _watch_memory(self) -> None:
        """Say when the lanes wait for memory, and when they need not any more."""
        waits = 0
        while True:
            before, waits = waits, self._memory_waits()
            if waits == before and self.starved:
                log.info("%s: there is memory again, pages flow", self._target.name)
                self.starved = ""
            elif waits > before and not self.starved:
                what = Room(groups_of(self._target.qemu.pid)).lacks(BUFFER_SIZE)
                self.starved = f"no memory for its pages: {what or 'the kernel refuses more'}"
                log.error(
                    "%s: %s; the guest waits for what it lacks until there is room",
                    *(self._target.name, self.starved),
                )
            await asyncio.sleep(_MEMORY_LOOK_S)

    def _memory_waits(self) -> int:
        lanes = (Lane.URGENT, Lane.BACKGROUND, Lane.PRECOPY)
        return sum(self._totals(lane).memory_waits for lane in lanes)

    # --- the control lane ---

    @property
    def _takes_device(self) -> bool:
        return self.state in (State.SETUP, State.DEVICE) and not self._loading

    async def _control(self) -> None:
        while (frame := await self._link.receive()) is not None:
            header, payload = frame
            match header.kind:
                case Kind.DEVICE if self._takes_device and payload:
                    await self._device(payload)
                case Kind.CLEAN if self._takes_clean:
                    await self._take_clean(header, payload)
                case Kind.DEVICE_END if self._takes_device and self._stream and self._knows_clean:
                    self._loading = True
                    self._spawn(self._load(), "load device state")
                case Kind.COMMIT if self._broken.done():
                    return  # run() is about to say ABORT
                case Kind.COMMIT if self.prepared and self.state is State.DEVICE:
                    self._commit(wire.unpack_json(Kind.COMMIT, payload))
                case Kind.PING if self.state.committed:
                    pass
                case Kind.BYE if self._complete:
                    return
                case Kind.ABORT if not self.state.committed:
                    reason = wire.unpack_json(Kind.ABORT, payload).get("reason")
                    raise _AbortedError(f"the source gave up: {reason}")
                case Kind.PAUSED if self.state.committed:
                    reason = wire.unpack_json(Kind.PAUSED, payload).get("reason")
                    raise LinkError(f"{self.peer}: {reason}")
                case kind:
                    raise ProtocolError(
                        f"{self.peer}: {kind.name} out of turn (state {self.state})"
                    )
        raise LinkError(f"{self.peer}: the source closed the control lane")

    @property
    def _knows_clean(self) -> bool:
        """Tell whether nothing more is to be said of pages that came in rounds of pre-copy."""
        return not self.hello.precopy_lanes or self._clean == len(self._target.areas)

    @property
    def _takes_clean(self) -> bool:
        return self._takes_device and not self._knows_clean

    async def _take_clean(self, header: wire.Header, bits: memoryview) -> None:
        """Have what came in rounds of pre-copy, and is not stale, be seen.

        In the order of areas and pages.  Not before all that the rounds sent is written: who marks
        a page never writes it again.
        """
        area = self._target.areas[self._clean]
        wire.check_bitmap(header, area.name, area.npages)
        if (header.area, header.pgoff) != (self._clean, self._clean_pgoff):
            raise ProtocolError(
                f"{self.peer}: CLEAN from page {header.pgoff} of area number {header.area} on, "
                f"page {self._clean_pgoff} of area {area.name} is next"
            )
        if not self._clean and not self._clean_pgoff:
            await self._rounds_are_over()
        await asyncio.to_thread(area.mark, runs(bits, header.pgoff, header.count))
        self._arrivals.know_bits(self._arrivals.slots.slot(header.area, header.pgoff), bits, header)
        self._clean_pgoff += header.count
        if self._clean_pgoff == area.npages:
            self._clean, self._clean_pgoff = self._clean + 1, 0
        if self._knows_clean:
            here = sum(one.info().nr_cached for one in self._target.areas)
            self._uncounted += here - self.progress().pages_done

    async def _rounds_are_over(self) -> None:
        """Wait until every pre-copy lane has written all that came before its END."""
        workers = [w for (lane, _), w in self._lanes.items() if lane is Lane.PRECOPY and w]
        if len(workers) < self.hello.precopy_lanes:
            raise ProtocolError(f"{self.peer}: CLEAN while pre-copy lanes are missing")
        try:
            async with asyncio.timeout(_ROUNDS_S):
                for worker in workers:
                    await worker.is_drained.wait()
        except TimeoutError:
            raise LinkError(f"{self.peer}: a pre-copy lane did not end") from None

    async def _device(self, piece: memoryview) -> None:
        """Pass a piece of device state on to QEMU, connecting at the first."""
        loop = asyncio.get_running_loop()
        if self._stream is None:
            if missing := self._missing_lanes:
                raise ProtocolError(f"{self.peer}: DEVICE while {missing} lane(s) are missing")
            self.state = State.DEVICE
            self._stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            self._stream.setblocking(False)
            try:
                await loop.sock_connect(self._stream, str(self._target.incoming))
            except OSError as e:
                raise QemuError(f"QEMU's {self._target.incoming}: {e.strerror}") from e
            # Takes back a `cont` that somebody typed while it waited: it would run by itself after
            # the load, before the commit.
            await self._target.qemu.execute("stop")
            self._target.qemu.resumed = False
        try:
            await loop.sock_sendall(self._stream, piece)
        except OSError as e:
            raise QemuError(f"QEMU does not take its device state: {e.strerror}") from e
        self._device_bytes += len(piece)

    async def _load(self) -> None:
        """Wait until QEMU has loaded everything and stands still; tell the source."""
        qemu = self._target.qemu
        try:
            # QEMU says so after every change of its state (process_incoming_migration_bh()).
            await qemu.wait_migration("completed")
            self._not_running()
            self._target.on_phase(Phase.PREPARED)
            self.prepared = True
            await self._link.send_json(Kind.PREPARED, {"device_state_bytes": self._device_bytes})
        except UmemError as e:
            self._break(e)

    def _not_running(self) -> None:
        """Raise QemuError when somebody continued the VM before it was ours."""
        if self._target.qemu.resumed:
            raise QemuError("somebody continued the VM at the destination before the commit")

    def _commit(self, message: dict[str, Any]) -> None:
        """From here on this side owns the VM."""
        self._not_running()
        run = flag(message, "run") and self._target.autostart
        self._target.on_phase(Phase.COMMITTED_RUN if run else Phase.COMMITTED)
        self.state = State.POSTCOPY_ACTIVE
        self._committed_at = time.monotonic()
        # Beside the control lane: QEMU's main loop may wait for a page, and signs of life go on.
        self._spawn(self._beat(), "heartbeat")
        self._spawn(self._start(run), "start")

    async def _start(self, run: bool) -> None:
        await self._target.started.wait()
        try:
            await self._link.send_json(Kind.RUNNING, {"running": run})
        except UmemError as e:
            self._break(e)
            return
        if run:
            # QEMU has done so when it had loaded; that the VM is here is certain only now.  Not
            # waited for: QEMU's main loop may wait for a page.
            self._spawn(self._target.qemu.announce(), "announce")
        self._spawn(self._watch_complete(), "watch completeness")

    async def _confirm(self) -> None:
        """Say every now and then which pages are here, if that has changed."""
        said = -1
        try:
            while True:
                here = sum(area.info().nr_cached for area in self._target.areas)
                if here != said:
                    await tell_have(self._link, self._target.areas)
                    said = here
                await asyncio.sleep(CONFIRM_S)
        except UmemError as e:
            self._break(e)

    async def _watch_complete(self) -> None:
        # Of a VM that is to run and does not yet, the source must not forget anything.
        await self._target.started.wait()
        if self.hello.confirm:
            self._spawn(self._confirm(), "confirm")
        try:
            for area in self._target.areas:
                while not area.info().complete:
                    await asyncio.sleep(_POLL_S)
            self._resident_at = time.monotonic()
            await self._tell_complete({})
        except UmemError as e:
            self._break(e)

    async def _tell_complete(self, more: dict[str, Any]) -> None:
        self._complete = True
        report = arrival_report(self._totals(Lane.URGENT), self._totals(Lane.BACKGROUND))
        report |= self._driver_counts().to_json()
        try:
            await self._link.send_json(Kind.COMPLETE, {**report, **more})
            await asyncio.sleep(_BYE_S)  # ended by the control lane's BYE
            raise LinkError(f"{self.peer}: no BYE within {_BYE_S:g} s")
        except LinkError as e:
            self._break(e)
