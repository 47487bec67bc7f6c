# SPDX-License-Identifier: GPL-2.0-or-later
"""The source's lanes to the destination, from one connection to the next: the control lane with
what the destination says on it, and a worker process behind each page lane.

A Lanes object is one life of them: connect(), add_workers(), and when anything breaks, close().  A
migration that is taken up again has a new one, with the same session and the same claim map.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from pyumem import wire
from pyumem.address import Address
from pyumem.claims import ClaimMap
from pyumem.compression import LANES, Compress, directory, offer
from pyumem.errors import LinkError, ProtocolError, UmemError
from pyumem.greeting import AsyncLink, introduce, introduce_control, software
from pyumem.heartbeat import beat
from pyumem.hello import NONCE_SIZE, AreaSpec, Hello, Lane
from pyumem.lanes.link import tune
from pyumem.lanes.prefetch import Prefetch
from pyumem.qemu import RamBlock
from pyumem.ram import PAGE_SIZE
from pyumem.release import Release
from pyumem.report import totals_of
from pyumem.stats import StatsBlock, Totals
from pyumem.tls import LaneSecurity, Security
from pyumem.wire import Kind
from pyumem.workers import Worker, stop_all

_T = TypeVar("_T")
_ANSWERS: Final = (Kind.PREPARED, Kind.RUNNING, Kind.COMPLETE)


@dataclass(frozen=True, slots=True)
class Session:
    """What all lanes of a migration have in common, however often they are connected."""

    id: str
    vm: str
    security: Security
    background_lanes: int
    prefetch: Prefetch
    compress: Compress
    ram: Sequence[RamBlock]
    ram_fds: Sequence[int]
    claims: ClaimMap
    release: Release | None
    """What gives pages back that the destination has."""
    rounds: ClaimMap | None = None
    """Claims of the rounds of pre-copy, if there are to be any."""

    def hello(self, lane: Lane, index: int = 0, *, resume: bool = False) -> Hello:
        """Return what is said at the beginning of a lane."""
        areas = tuple(AreaSpec(block.id, block.size, PAGE_SIZE) for block in self.ram)
        return Hello(
            lane=lane,
            session=self.id,
            vm=self.vm,
            nonce=secrets.token_hex(NONCE_SIZE),
            software=software(),
            index=index,
            background_lanes=self.background_lanes,
            areas=areas if lane is Lane.CONTROL else (),
            resume=resume,
            confirm=self.release is not None and lane is Lane.CONTROL,
            compression=offer(self.compress) if lane in LANES else "",
            precopy_lanes=self.precopy_lanes if lane is Lane.CONTROL else 0,
        )

    @property
    def precopy_lanes(self) -> int:
        """Return how many lanes the rounds have."""
        return self.background_lanes if self.rounds else 0


class Lanes:
    """One life of a migration's connections."""

    def __init__(
        self,
        session: Session,
        to: Address,
        tell: Callable[[str], None],
        expected: Callable[[Kind], bool],
    ) -> None:
        """Connect nothing yet.

        tell() gets the lines that the user should see; expected() says whether the destination may
        say that now.
        """
        self._session = session
        self._to = to
        self._tell = tell
        self._expected = expected
        loop = asyncio.get_running_loop()
        self.broken: asyncio.Future[None] = loop.create_future()
        """Done, with the error, when a lane, the peer or somebody else made an end of it."""
        self.told: dict[Kind, asyncio.Future[dict[str, Any]]] = {
            kind: loop.create_future() for kind in _ANSWERS
        }
        """What the destination said, once it did."""
        self.aborted = False
        """The destination's last word was ABORT."""
        self.workers: dict[tuple[Lane, int], Worker] = {}
        self.link: AsyncLink | None = None
        self._security = LaneSecurity(b"")
        self._begun: set[Lane] = set()
        self._lost: set[Worker] = set()
        self._idle_may_be_lost = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.control: asyncio.Task[None] | None = None
        """Follows the control lane; done when the destination closed it."""

    # --- connecting ---

    async def connect(self, *, resume: bool = False) -> AsyncLink:
        """Open the control lane and be welcome on it.  Raises LinkError, RefusedError."""
        self.link = await AsyncLink.connect(self._to)
        self.link.tune(control=True)
        self._security = await introduce_control(
            self.link,
            self._session.security,
            self._session.hello(Lane.CONTROL, resume=resume),
            self._to.host,
        )
        return self.link

    def follow(self) -> None:
        """Listen to the control lane from now on."""
        assert self.link is not None
        self.control = self.spawn(self._control(self.link), "control lane")

    async def add_workers(self) -> None:
        """Connect every page lane and start its worker, all at once."""
        wanted = [(Lane.URGENT, 0)]
        wanted += [(Lane.BACKGROUND, index) for index in range(self._session.background_lanes)]
        wanted += [(Lane.PRECOPY, index) for index in range(self._session.precopy_lanes)]
        results = await asyncio.gather(
            *(self._add_worker(lane, index) for lane, index in wanted), return_exceptions=True
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _add_worker(self, lane: Lane, index: int) -> None:
        session = self._session
        name = f"{lane.value} lane {index} of {session.vm}"
        worker = Worker(name, StatsBlock.create(name), self.worker_failed)
        self.workers[lane, index] = worker
        link = await AsyncLink.connect(self._to)
        try:
            hello = session.hello(lane, index)
            welcome = await introduce(link, self._security.token, hello)
        except BaseException:
            link.close()
            raise
        compression = None
        if hello.compression and welcome.compression == hello.compression:
            compression = {"directory": directory(), "wish": session.compress.value}
        elif session.compress is Compress.ON and (lane, index) == (Lane.BACKGROUND, 0):
            self._tell(f"{link.peer} does not take compressed pages: they go as they are")
        claims = session.claims
        if lane is Lane.PRECOPY:
            assert session.rounds is not None
            claims = session.rounds
        message = {
            "peer": link.peer,
            "index": index,
            "background_lanes": session.background_lanes,
            "areas": [{"id": block.id, "size_bytes": block.size} for block in session.ram],
            "prefetch": session.prefetch.to_json(),
            "compression": compression,
            "tls": self._security.to_json(),
        }
        with contextlib.closing(link.detach()) as sock:
            tune(sock, urgent=lane is Lane.URGENT, background=lane is Lane.BACKGROUND)
            await worker.start(
                f"source_{lane.value}",
                message,
                [sock.fileno(), claims.memory.fd, *session.ram_fds],
            )

    # --- what the workers do ---

    def go(self, lane: Lane) -> None:
        """Let the workers of a lane begin.  Once: they take a second word for the end."""
        if lane in self._begun:
            return
        self._begun.add(lane)
        for (kind, _), worker in self.workers.items():
            if kind is lane:
                worker.command("go")

    def committed(self, *, background: bool) -> None:
        """Beat from now on; and a background lane that is to claim no page may be lost."""
        assert self.link is not None
        self._idle_may_be_lost = not background
        self.spawn(self._beat(self.link), "heartbeat")

    async def _beat(self, link: AsyncLink) -> None:
        try:
            await beat(link)
        except LinkError as e:
            self.break_off(e)

    @property
    def background_lost(self) -> bool:
        """Tell whether there were background lanes and none is left."""
        lanes = {w for (kind, _), w in self.workers.items() if kind is Lane.BACKGROUND}
        return bool(lanes) and lanes <= self._lost

    def totals(self, lane: Lane) -> Totals:
        """Return the sum of a lane's counters."""
        return totals_of(w.totals() for (kind, _), w in self.workers.items() if kind is lane)

    # --- trouble ---

    def worker_failed(self, worker: Worker, reason: str) -> None:
        """Hear that a worker is no more: the end of all lanes, unless no page is lost with it."""
        if worker.drained or self._waits_for_go(worker):
            self._lost.add(worker)
            self._tell(f"{reason}; no page is lost with it")
        else:
            self.break_off(LinkError(reason))

    def _waits_for_go(self, worker: Worker) -> bool:
        """Tell whether it is a background lane of `-n` that has not claimed a page."""
        return (
            self._idle_may_be_lost
            and Lane.BACKGROUND not in self._begun
            and worker in {w for (kind, _), w in self.workers.items() if kind is Lane.BACKGROUND}
        )

    def break_off(self, error: UmemError) -> None:
        """Make an end of it; the first reason counts."""
        if not self.broken.done():
            self.broken.set_exception(error)

    async def unless_broken(
        self, work: Coroutine[Any, Any, _T], *, result_counts: bool = False
    ) -> _T:
        """Do the work, but give up as soon as a lane, the peer or QEMU fails.

        Bad news that came at the same time as good counts; with result_counts, after the commit,
        it does not: what the peer said last is what it did.
        """
        task = asyncio.create_task(work, name=f"{self._session.vm}: work")
        try:
            waiting: set[asyncio.Future[Any]] = {task, self.broken}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if self.broken.done() and not (result_counts and task.done()):
                self.broken.result()
            return task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run something beside, at most until close()."""
        task = asyncio.create_task(coroutine, name=f"{self._session.vm}: {name}")
        self._tasks.add(task)
        return task

    # --- the control lane ---

    async def _control(self, link: AsyncLink) -> None:
        try:
            while (frame := await link.receive()) is not None:
                header, payload = frame
                if header.kind is Kind.PING:
                    continue
                if header.kind is Kind.HAVE:
                    await self._release(header, payload)
                    continue
                message = wire.unpack_json(header.kind, payload)
                told = self.told.get(header.kind)
                if header.kind in (Kind.ABORT, Kind.PAUSED):
                    self.aborted = header.kind is Kind.ABORT
                    raise LinkError(f"{link.peer}: {message.get('reason')}")
                if told is None or told.done() or not self._expected(header.kind):
                    raise ProtocolError(f"{link.peer}: {header.kind.name} out of turn")
                told.set_result(message)
                if header.kind is Kind.COMPLETE:
                    return
            raise LinkError(f"{link.peer}: the destination closed the control lane")
        except UmemError as e:
            self.break_off(e)

    async def _release(self, header: wire.Header, bits: memoryview) -> None:
        """Give back what the destination says that it has."""
        ram, release = self._session.ram, self._session.release
        # Before the commit no page here is the second one.
        if (
            release is None
            or not self._expected(Kind.HAVE)
            or header.area >= len(ram)
            or header.pgoff % 8
        ):
            raise ProtocolError(f"{self._to}: HAVE out of turn, or of an area that is not there")
        area = ram[header.area]
        wire.check_bitmap(header, area.id, area.size // PAGE_SIZE)
        if release.failed:
            return
        try:
            # The kernel frees pages meanwhile; not in the event loop.
            await asyncio.to_thread(release.take, header.area, header.pgoff, bits)
        except UmemError as e:
            self._tell(f"{e}; no memory is given back before the end")

    # --- the end ---

    async def close(self) -> None:
        """Stop the workers and close the connections; counters stay readable."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await stop_all(list(self.workers.values()))
        if self.link is not None:
            self.link.close()
        if self.broken.done() and not self.broken.cancelled():
            self.broken.exception()  # looked at, so that asyncio does not complain
        self.broken.cancel()
        for future in self.told.values():
            future.cancel()

    def free(self) -> None:
        """Unmap the counters, after close(), when nobody will ask for them any more."""
        for worker in self.workers.values():
            worker.close()
