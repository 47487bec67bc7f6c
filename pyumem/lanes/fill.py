# SPDX-License-Identifier: GPL-2.0-or-later
"""What both lanes of the destination do with pages: check them, receive them, write them to the
backing file, mark them cached.

They are received into a buffer that stays in the processor's cache, not into a mapping of the
backing file: there each new page costs a trap, is zeroed before it is overwritten and is charged to
us; a write costs a call for many pages and a second copy that misses no cache (`make bench-fault`
measures both: umem, umem-place).  And when there is no memory, a write says so; a mapping kills.

Three things are shared by the lanes of a migration:

  areas     the driver's areas, or anything with their interface (AreaLike)
  received  one byte a page: a page that came once is refused a second time, since the guest owns it
            by then.  The lanes look at it without a lock: a source that lies and sends a page on
            two lanes in the same instant gets both in.  It could have sent anything the first time,
            and it is its own guest; a lock would have a requested page wait for a background lane
            that was preempted with it
  asked     one 64-bit word a page: when the request was read off the driver (CLOCK_MONOTONIC, ns),
            0 if never; the lane on which the page then
            comes, whichever it is, records the latency
"""

from __future__ import annotations

import errno
import mmap
import sys
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Protocol

from pyumem import wire
from pyumem.claims import Slots, spread
from pyumem.errors import DriverError, ProtocolError
from pyumem.holes import punch
from pyumem.lanes.link import Link
from pyumem.lanes.room import Room
from pyumem.shm import ProcessLock, SharedMemory
from pyumem.stats import Counter, StatsBlock

PAGE_SIZE: Final = mmap.PAGESIZE
BUFFER_PAGES: Final = max(1, max(wire.MAX_PACKED, wire.MAX_SCATTERED) // PAGE_SIZE)
BUFFER_SIZE: Final = BUFFER_PAGES * PAGE_SIZE
"""Fits the second-level cache, and bounds for how long a lane has the file's lock."""
_NO_MEMORY_S: Final = 0.2
_COMING: Final = b"\1"
_HERE: Final = b"\2"


Unpack = Callable[[memoryview, memoryview], None]
"""Makes pages, its second argument, of compressed ones."""


def make_unpack(directory: str) -> Unpack | None:
    """Return what a lane unpacks with; the directory is the start message's, empty where nothing
    was agreed upon.  Raises UmemError.
    """
    if not directory:
        return None
    # Costs a worker time and memory that not all need.
    from pyumem.lanes.compress import Unpacker

    return Unpacker(directory).unpack


class AreaLike(Protocol):
    """What the lanes need of pyumem.area.Area; tests have one without a driver."""

    @property
    def name(self) -> str:
        """Name, for errors."""

    @property
    def npages(self) -> int:
        """Size in pages."""

    shmem_fd: int
    """The backing file."""

    @property
    def granule_pages(self) -> int:
        """Pages that are marked together, and asked for together."""

    def fileno(self) -> int:
        """Descriptor that is readable while a request is pending."""

    def write(self, pgoff: int, data: memoryview) -> None:
        """Write whole pages to the backing file."""

    def requests(self) -> memoryview:
        """Requests as words pgoff, flags, ...; empty when there is none.  Of a granule it is the
        first page.
        """

    def open_requests(self) -> list[int]:
        """Pages that were requested and are missing still."""

    def mark(self, ranges: Iterable[tuple[int, int]], *, touch: bool = False) -> int:
        """Mark ranges, return how many pages were missing before; touch: map them at once."""


class Arrivals:
    """The two shared maps, as one process sees them."""

    def __init__(self, slots: Slots, received: SharedMemory, asked: SharedMemory) -> None:
        """Own both memories from now on."""
        self.slots: Final = slots
        self.received = received
        self.asked = asked
        self._times = memoryview(asked.map).cast("Q")
        self._lock = ProcessLock(received.fd)

    @classmethod
    def create(cls, slots: Slots) -> Arrivals:
        """Make both, empty."""
        return cls(
            slots,
            SharedMemory.create("received", slots.total),
            SharedMemory.create("asked", 8 * slots.total),
        )

    @classmethod
    def attach(cls, slots: Slots, fds: Sequence[int]) -> Arrivals:
        """Map what another process made; the two descriptors are owned from now on."""
        received, asked = fds
        return cls(slots, SharedMemory.attach(received), SharedMemory.attach(asked))

    @property
    def fds(self) -> list[int]:
        """Return the descriptors to hand to attach() in another process."""
        return [self.received.fd, self.asked.fd]

    def know(self, slot: int, count: int, words: array[int]) -> int:
        """Note, before any lane begins, which of `count` pages from a slot on are here already: a
        bitmap of the driver's, 64 pages to a word.  Returns how many.
        """
        if sys.byteorder == "big":
            words.byteswap()
        data = spread(words.tobytes(), _HERE[0])
        self.received.map[slot : slot + count] = data[:count]
        return data.count(_HERE, 0, count)

    def know_bits(self, slot: int, bits: memoryview, header: wire.Header) -> None:
        """Note of the pages of a bitmap frame which are here; lanes may run beside, and bring none
        of them.
        """
        here = spread(bits, _HERE[0])[: header.count]
        self.received.map[slot : slot + header.count] = here

    def asked_now(self, slot: int) -> bool:
        """Note that the page is asked for.  False when it was already."""
        if self._times[slot]:
            return False
        self._times[slot] = time.monotonic_ns()
        return True

    def coming(self, slot: int, count: int) -> bool:
        """Note that pages are being received.

        False, and nothing noted, when one of them came before.
        """
        data = self.received.map
        # Bytes are 0, 1 or 2: all of them are 0 exactly when stripping zeros leaves nothing.
        if data[slot : slot + count].strip(b"\0"):
            return False
        data[slot : slot + count] = _COMING * count
        return True

    def here(self, slot: int, count: int, stats: StatsBlock) -> None:
        """Note that pages are marked, and record the latency of those that were asked for."""
        self.received.map[slot : slot + count] = _HERE * count
        times = self._times[slot : slot + count]
        if count > 1 and not any(times):
            times.release()
            return
        now = 0
        for since in times:
            if since:
                now = now or time.monotonic_ns()
                stats.latency(now - since)
                # Not cleared: a request that the driver delivers twice is asked for once.
        times.release()

    def complete(self, base: int, pgoff: int, count: int, step: int) -> list[tuple[int, int]]:
        """Note that pages of an area whose first slot is `base`, with granules of `step` pages, are
        written but not marked yet.

        Returns the ranges (first page, count) of the granules of which nothing is missing now.
        Several lanes may bring the pages of one; of two that bring its last ones, one is told.
        """
        data = self.received.map
        first, end = pgoff - pgoff % step, -(-(pgoff + count) // step) * step
        whole: list[tuple[int, int]] = []
        with self._lock:
            data[base + pgoff : base + pgoff + count] = _HERE * count
            for granule in range(first, end, step):
                if data[base + granule : base + granule + step].strip(_HERE):
                    continue
                if whole and sum(whole[-1]) == granule:
                    whole[-1] = (whole[-1][0], whole[-1][1] + step)
                else:
                    whole.append((granule, step))
        return whole

    def close(self) -> None:
        """Unmap; again is harmless."""
        self._times.release()
        self._lock.close()
        self.received.close()
        self.asked.close()


class Filler:
    """Takes the frames with pages of one lane."""

    def __init__(
        self,
        link: Link,
        areas: Sequence[AreaLike],
        arrivals: Arrivals,
        stats: StatsBlock,
        *,
        room: Room | None = None,
        touch: bool = False,
        untouched: bool = False,
        unpack: Unpack | None = None,
    ) -> None:
        """Fill the areas from the link, while there is room.  touch: map pages for the guest as
        they come; untouched: a missing page never had content, since there was no pre-copy before,
        by whatever process; unpack: makes pages of compressed ones (pyumem.lanes.compress), where
        those were agreed upon.
        """
        self._touch = touch
        self._untouched = untouched
        self._room = room or Room(())
        self._link = link
        self._areas = areas
        self._arrivals = arrivals
        self._stats = stats
        self._buffer = memoryview(mmap.mmap(-1, BUFFER_SIZE))
        self._unpack = unpack
        self._packed = memoryview(mmap.mmap(-1, wire.MAX_PACKED))
        self._ranges = memoryview(bytearray(wire.MAX_SCATTERED_HEAD))

    def take(self, header: wire.Header) -> None:
        """Receive and mark what the frame brings.

        Raises ProtocolError (naming peer, area and range), LinkError, DriverError.
        """
        try:
            area = self._area(header)
            if header.kind is wire.Kind.PAGES:
                self._pages(header, area)
            elif header.kind is wire.Kind.SCATTERED:
                self._scattered(header, area)
            elif header.kind is wire.Kind.PACKED and self._unpack is not None:
                self._unpack_pages(header, area, self._unpack)
            elif header.kind is wire.Kind.ZERO:
                self._zero(header, area)
            else:
                raise ProtocolError(f"{header.kind.name} does not belong on this lane")
        except ProtocolError as e:
            raise ProtocolError(f"{self._link.peer}: {e}") from None

    def _area(self, header: wire.Header) -> AreaLike:
        if header.area >= len(self._areas):
            raise ProtocolError(
                f"{header.kind.name} for area number {header.area}, there are {len(self._areas)}"
            )
        return self._areas[header.area]

    def _pages(self, header: wire.Header, area: AreaLike) -> None:
        pgoff, count = header.pgoff, header.count
        wire.check_pages(header, area.name, area.npages, PAGE_SIZE)
        slot = self._fresh("PAGES", header.area, area, pgoff, count)
        self._receive(area, pgoff, count)
        self._written(area, pgoff, count, slot)

    def _receive(self, area: AreaLike, pgoff: int, count: int) -> None:
        """Receive pages and write them, a buffer at a time."""
        for start in range(pgoff, pgoff + count, BUFFER_PAGES):
            pages = min(BUFFER_PAGES, pgoff + count - start)
            with self._buffer[: pages * PAGE_SIZE] as data:
                self._link.receive_into(data)
                self._write(area, start, data)

    def _scattered(self, header: wire.Header, area: AreaLike) -> None:
        ranges = self._scattered_ranges(header, area)
        slots = [
            self._fresh("SCATTERED", header.area, area, pgoff, count) for pgoff, count in ranges
        ]
        self._receive_scattered(area, ranges)
        self._mark(area, slots[0], ranges, touch=self._touch)
        self._stats.add(Counter.PAGES, sum(count for _, count in ranges))

    def _scattered_ranges(self, header: wire.Header, area: AreaLike) -> list[tuple[int, int]]:
        size = wire.scattered_ranges_size(header, area.name)
        with self._ranges[:size] as raw:
            self._link.receive_into(raw)
            return wire.unpack_scattered(header, raw, area.name, area.npages, PAGE_SIZE)

    def _receive_scattered(self, area: AreaLike, ranges: Sequence[tuple[int, int]]) -> None:
        """Receive the content of ranges, and write it where it belongs."""
        size = sum(count for _, count in ranges) * PAGE_SIZE
        with self._buffer[:size] as data:
            self._link.receive_into(data)
            at = 0
            for pgoff, count in ranges:
                with data[at : at + count * PAGE_SIZE] as part:
                    self._write(area, pgoff, part)
                at += count * PAGE_SIZE

    def _unpack_pages(self, header: wire.Header, area: AreaLike, unpack: Unpack) -> None:
        pgoff, count = header.pgoff, header.count
        wire.check_packed(header, area.name, area.npages, PAGE_SIZE)
        slot = self._fresh("PACKED", header.area, area, pgoff, count)
        self._receive_packed(header, area, unpack)
        self._written(area, pgoff, count, slot)

    def _receive_packed(self, header: wire.Header, area: AreaLike, unpack: Unpack) -> None:
        """Receive compressed pages and write them."""
        pgoff, count = header.pgoff, header.count
        size = count * PAGE_SIZE
        with self._packed[: header.length] as packed, self._buffer[:size] as data:
            self._link.receive_into(packed)
            try:
                unpack(packed, data)
            except ProtocolError as e:
                raise ProtocolError(
                    f"PACKED of {count} page(s) from page {pgoff} on, area {area.name}: {e}"
                ) from None
            self._write(area, pgoff, data)
        self._stats.add(Counter.BYTES_BEFORE, size)
        self._stats.add(Counter.BYTES_AFTER, header.length)

    def _written(self, area: AreaLike, pgoff: int, count: int, slot: int) -> None:
        self._mark(area, slot, ((pgoff, count),), touch=self._touch)
        self._stats.add(Counter.PAGES, count)

    def _mark(
        self, area: AreaLike, slot: int, ranges: Sequence[tuple[int, int]], *, touch: bool = False
    ) -> None:
        """Mark what was written, or is zero; of a granule all at once, when nothing is missing.

        slot is that of the first range.
        """
        base, step = slot - ranges[0][0], area.granule_pages
        if step > 1:
            ranges = [
                whole
                for pgoff, count in ranges
                for whole in self._arrivals.complete(base, pgoff, count, step)
            ]
            if not ranges:
                return
        self._stats.add(Counter.MARKED, area.mark(ranges, touch=touch))
        for pgoff, count in ranges:
            self._arrivals.here(base + pgoff, count, self._stats)

    def _write(self, area: AreaLike, pgoff: int, data: memoryview) -> None:
        """Write, and as long as there is no memory, wait for it: giving up would end the guest."""
        while True:
            try:
                if not self._room.lacks(len(data)):
                    area.write(pgoff, data)
                    return
            except DriverError as e:
                if e.errno not in (errno.ENOMEM, errno.ENOSPC):
                    raise
            self._stats.add(Counter.MEMORY_WAITS, 1)
            time.sleep(_NO_MEMORY_S)

    def _zero(self, header: wire.Header, area: AreaLike) -> None:
        ranges = wire.unpack_ranges(header, self._link.payload(header), area.name, area.npages)
        slots = [self._fresh("ZERO", header.area, area, pgoff, count) for pgoff, count in ranges]
        if not self._untouched:
            # What a round of pre-copy brought and is stale now is still there.
            self._punch(area, ranges)
        self._mark(area, slots[0], ranges)
        self._stats.add(Counter.ZERO_PAGES, sum(count for _, count in ranges))

    def _punch(self, area: AreaLike, ranges: Sequence[tuple[int, int]]) -> None:
        """Have ranges read as zeros."""
        for pgoff, count in ranges:
            try:
                punch(area.shmem_fd, pgoff * PAGE_SIZE, count * PAGE_SIZE)
            except OSError as e:
                raise DriverError(
                    "punch", e.errno or 0, area=area.name, pages=(pgoff, count)
                ) from e

    def _fresh(self, what: str, index: int, area: AreaLike, pgoff: int, count: int) -> int:
        slot = self._arrivals.slots.slot(index, pgoff)
        if not self._arrivals.coming(slot, count):
            raise ProtocolError(
                f"{what} of {count} page(s) from page {pgoff} on, area {area.name}: "
                f"at least one of them was sent before"
            )
        return slot
