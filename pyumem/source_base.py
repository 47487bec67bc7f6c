# SPDX-License-Identifier: GPL-2.0-or-later
"""What both halves of the source's life share: the VM's RAM, the lanes of the moment, what is
known of how far it is, and what the operator may change while it runs.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyumem.address import Address
from pyumem.area import Area
from pyumem.areafs import area_number
from pyumem.claims import UNPACED, ClaimMap, Slots
from pyumem.compression import Compress
from pyumem.convergence import Limits
from pyumem.errors import CheckError, DriverError, UmemError
from pyumem.hello import Lane
from pyumem.lanes.prefetch import NO_PREFETCH, Prefetch
from pyumem.precopy import Precopy
from pyumem.qemu import Qemu, RamBlock
from pyumem.ram import PAGE_SIZE
from pyumem.release import Release
from pyumem.report import Progress, Report, State
from pyumem.source_lanes import Lanes, Session
from pyumem.stats import Totals
from pyumem.tls import Security
from pyumem.wire import Kind

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done."""

    qmp: Path
    destination: Address
    security: Security
    background: bool = True
    """False: pages only on request (`-n`), until set_background() says otherwise."""
    background_lanes: int = 1
    max_bandwidth: int | None = None
    """Bytes per second of all background lanes together; None: as fast as they can."""
    release_ram: bool = False
    """Give pages back to the host as soon as the destination has them."""
    precopy: Limits | None = None
    """Rounds while the VM runs, before it moves; None: it moves at once."""
    may_switch: bool = True
    """The rounds may be ended by `umemctl switch`, and the rest be post-copied."""
    prefetch: Prefetch = NO_PREFETCH
    """Neighbours of requested pages that are sent unasked."""
    compress: Compress = Compress.AUTO
    """Whether pages that nobody waits for are compressed."""


class SourceBase:
    """State, and the answers to those who ask for it."""

    def __init__(self, plan: Plan, tell: Callable[[str], None], session: str) -> None:
        """Take nothing yet.  tell() gets the lines that the user should see."""
        self._plan = plan
        self._user = tell
        self._session_id = session
        self._to = plan.destination
        self.state = State.SETUP
        self.vm = ""
        self.locked = False
        """True from when the VM's name is known and this process has it for itself."""
        self._started = time.monotonic()
        self._was_running = False
        self._qemu: Qemu | None = None
        self._ram: list[RamBlock] = []
        self._ram_fds: list[int] = []
        self._claims: ClaimMap | None = None
        self._release: Release | None = None
        self._page_fds: list[int] = []
        """What each RAM block is read from: the backing file of its area, or what _ram_fds has."""
        self._areas: list[Area] = []
        """The areas of which this process is the server: with pre-copy, of all RAM blocks."""
        self._precopy: Precopy | None = None
        self._lanes: Lanes | None = None
        self._past: dict[str, Totals] = {}
        """What lanes that are closed have moved, by their names."""
        self._uncounted = 0
        self._background = plan.background
        self._max_bandwidth = plan.max_bandwidth
        self._device_bytes = 0
        self._stopped_at = 0.0
        self.report = Report("", str(self._to), session, State.SETUP)

    def _tell(self, text: str) -> None:
        """Tell the user.  A terminal that is gone or a full disk must not harm the VM."""
        with contextlib.suppress(OSError, ValueError):
            self._user(text)

    # --- what is known ---

    def _by_lane(self) -> dict[str, Totals]:
        """Return what each lane has moved, in all its lives."""
        found = dict(self._past)
        for (lane, index), worker in (self._lanes.workers if self._lanes else {}).items():
            name = f"{lane.value}-{index}"
            found[name] = found.get(name, Totals()) + worker.totals()
        return found

    def _totals(self, lane: Lane) -> Totals:
        return sum((t for name, t in self._by_lane().items() if name.startswith(lane)), Totals())

    def progress(self) -> Progress:
        """Return how far it is."""
        urgent, background = self._totals(Lane.URGENT), self._totals(Lane.BACKGROUND)
        rounds = self._totals(Lane.PRECOPY)
        return Progress(
            state=self.state,
            pages_total=sum(block.size for block in self._ram) // PAGE_SIZE,
            pages_demand=urgent.pages,
            pages_background=background.pages,
            pages_zero=urgent.zero_pages + background.zero_pages,
            pages_uncounted=self._uncounted,
            bytes_moved=urgent.bytes_sent + background.bytes_sent + rounds.bytes_sent,
            elapsed_s=round(time.monotonic() - self._started, 3),
        )

    def _count_anew(self, there: int) -> None:
        """Know that so many pages are at the destination, whatever was counted so far."""
        self._uncounted = 0
        self._uncounted = there - self.progress().pages_done

    def to_json(self) -> dict[str, Any]:
        """Return what status shows."""
        return {
            "name": self.vm,
            "destination": str(self._to),
            "session": self._session_id,
            "background": self._background,
            "max_bandwidth_bytes_s": self._max_bandwidth,
            "pid": os.getpid(),
            "error": self.report.error,
            "recoveries": self.report.recoveries,
            "precopy": self._precopy.known.to_json() if self._precopy else None,
            **self.progress().to_json(),
            "requests": self._totals(Lane.URGENT).requests,
            "bytes_sent_by_lane": self._bytes_by_lane(),
            "workers": [
                {"lane": f"{lane.value}-{index}", "pid": worker.pid}
                for (lane, index), worker in (self._lanes.workers if self._lanes else {}).items()
            ],
        }

    def _fill_report(self) -> None:
        report, progress = self.report, self.progress()
        report.state = self.state
        report.destination = str(self._to)
        report.total_s = round(time.monotonic() - self._started, 3)
        report.pages_demand = progress.pages_demand
        report.pages_prefetched = self._totals(Lane.URGENT).prefetched
        report.pages_background = progress.pages_background
        report.pages_zero = progress.pages_zero
        unhurried = self._totals(Lane.BACKGROUND) + self._totals(Lane.PRECOPY)
        report.bytes_before_compression = unhurried.bytes_before
        report.bytes_after_compression = unhurried.bytes_after
        report.pages_released = self._release.pages if self._release else 0
        report.device_state_bytes = self._device_bytes
        if self._precopy:
            report.precopy = self._precopy.report()
        report.bytes_sent_by_lane = self._bytes_by_lane()

    def _bytes_by_lane(self) -> dict[str, int]:
        return {"control": self._device_bytes} | {
            name: totals.bytes_sent for name, totals in self._by_lane().items()
        }

    def _take_ram(self, ram: list[RamBlock]) -> None:
        """Know the RAM blocks from now on."""
        self._ram = ram
        self.report.ram_bytes = sum(block.size for block in ram)
        self.report.page_size_bytes = PAGE_SIZE
        self.report.pages_total = self.report.ram_bytes // PAGE_SIZE

    def _find_pages(self) -> None:
        """Know where the RAM is read: of an area in its backing file, which has holes that its node
        does not show, if this process may be its server.
        """
        for block, fd in zip(self._ram, self._ram_fds, strict=True):
            if area_number(fd) is not None:
                try:
                    self._take_area(block, fd)
                except (CheckError, DriverError) as e:
                    log.info("%s: it is read as QEMU sees it", e)
                else:
                    self._page_fds.append(self._areas[-1].shmem_fd)
                    continue
            self._page_fds.append(fd)

    def _take_areas(self, limits: Limits) -> None:
        """Be the server of the RAM's areas: who has them read the log of writes.

        Raises CheckError that names the fix, DriverError.
        """
        for block, fd in zip(self._ram, self._ram_fds, strict=True):
            if area_number(fd) is None:
                raise CheckError(
                    f"RAM block {block.id}: {block.path} is no area of the driver, and only that "
                    "knows what the guest writes: load the driver here and start the VM with "
                    "umem-qemu anew, or use `umemctl migrate -p`"
                )
            self._take_area(block, fd)
            if self._areas[-1].granule_size != PAGE_SIZE:
                raise CheckError(f"RAM block {block.id}: pre-copy needs granules of one page")
            self._page_fds.append(self._areas[-1].shmem_fd)
        self._precopy = Precopy(self._areas, limits, self._tell, self.vm)

    def _take_area(self, block: RamBlock, fd: int) -> None:
        """Be the server of a RAM block's area.  Raises CheckError, DriverError."""
        number = area_number(fd)
        assert number is not None
        where = f"RAM block {block.id}: {block.path}"
        if not Area.look(number).complete:
            # Perhaps who receives it is gone for the moment: it will want to be its server again.
            raise CheckError(
                f"{where} lacks pages still that another host has: have `umemctl serve` here "
                "receive them first"
            )
        try:
            self._areas.append(Area.reattach(number))
        except DriverError as e:
            why = "it has a server" if e.errno == errno.EBUSY else str(e)
            raise CheckError(f"{where}: {why}") from e

    def _make_claims(self) -> None:
        """Make the map in which nothing is sent yet.

        Raises CheckError for RAM of which nothing can be given back, if that is wanted.
        """
        if self._plan.release_ram:
            self._release = Release(self._ram)
        self._claims = ClaimMap.create(Slots([block.size // PAGE_SIZE for block in self._ram]))
        self._set_pace()

    # --- what may be changed ---

    def set_background(self, on: bool) -> None:
        """Switch the background transfer on or off; pages come on request either way.

        Raises UmemError for what cannot be.
        """
        if not on:
            self._background = False
        elif not self._background:
            if self._lanes and self._lanes.background_lost:
                raise UmemError(
                    "the connection for it was lost; pages still come on request, and "
                    f"`umemctl recover {self.vm}` connects anew"
                )
            self._background = True
            if self._lanes and self.state is State.POSTCOPY_ACTIVE:
                self._lanes.go(Lane.BACKGROUND)
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
        if self._precopy:
            # -n and `umemctl background --off` are about what follows the rounds.
            limit = self._max_bandwidth
            lanes = self._plan.background_lanes
            self._precopy.claims.pace = UNPACED if limit is None else max(1, limit // lanes)

    def switch(self) -> None:
        """End the rounds of pre-copy now.  Raises UmemError for what cannot be."""
        if self._precopy is None or self.state is not State.PRECOPY_ACTIVE:
            raise UmemError(f"{self.vm} is {self.state}: there are no rounds to end")
        if not self._plan.may_switch:
            raise UmemError(f"{self.vm}: --no-postcopy was given")
        self._precopy.force_switch()

    # --- lanes ---

    def _expected(self, kind: Kind) -> bool:
        """Tell whether the destination may say that now."""
        if kind is Kind.PREPARED:
            return self.state is State.DEVICE
        return self.state.committed

    def _new_lanes(self) -> Lanes:
        """Return lanes that are not connected yet; they are the ones of the moment from now on."""
        assert self._claims is not None
        session = Session(
            id=self._session_id,
            vm=self.vm,
            security=self._plan.security,
            background_lanes=self._plan.background_lanes,
            prefetch=self._plan.prefetch,
            compress=self._plan.compress,
            ram=self._ram,
            ram_fds=self._page_fds,
            claims=self._claims,
            release=self._release,
            rounds=self._precopy.claims if self._precopy and not self.state.committed else None,
        )
        self._lanes = Lanes(session, self._to, self._tell, self._expected)
        return self._lanes

    async def _drop_lanes(self) -> None:
        """Close the lanes of the moment and remember what they have moved."""
        if self._lanes is None:
            return
        await self._lanes.close()
        self._past = self._by_lane()
        self._lanes.free()
        self._lanes = None

    # --- the end ---

    async def _close(self) -> None:
        await self._drop_lanes()
        if self._qemu is not None:
            await self._qemu.close()
        if self._claims is not None:
            self._claims.close()
        if self._release is not None:
            self._release.close()
        if self._precopy is not None:
            self._precopy.close()
        for area in self._areas:
            area.close()  # and with it the log of writes ends
        for fd in self._ram_fds:
            os.close(fd)
