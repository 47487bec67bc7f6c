# SPDX-License-Identifier: GPL-2.0-or-later
"""Who sends which page: one byte a page, shared by all lanes of the source, so that a page is sent
once.

Pages of all areas are numbered in one row ("slots"): area 0 first, then area 1, and so on.  Whoever
turns a slot's byte from 0 to 1 under the lock has to send that page.  The map also has the cursor
of the background transfer, which a request moves to behind the page that was asked for: what the
guest touched last tells best what it touches next; the pace of that transfer, which the parent may
change at any time; and what its lanes tell each other of what they have on their way
(pyumem.lanes.window).
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Final

from pyumem.shm import ProcessLock, SharedMemory
from pyumem.wire import MAX_LANES

_HEAD: Final = 4096
# Native, so that a number is stored at once: another process reads it at any time.
_NUMBER: Final = struct.Struct("Q")
_CURSOR_AT: Final = 0
_PACE_AT: Final = 8
_WINDOW_AT: Final = 16
_LANE: Final = struct.Struct("QQ")
_LANES: Final = struct.Struct(f"{2 * MAX_LANES}Q")
_LANES_AT: Final = 64
_FREE: Final = b"\0"
_PART: Final = 4096
"""Bytes of a bitmap that are looked at together: most have all bits alike, be it that nothing is
there yet, or nearly everything.
"""
_SPREAD: Final = 64
"""Runs that are claimed together lie within so many times their length: a request waits while they
are looked for.
"""
_FREE_DIGITS: Final = bytes.maketrans(b"\0\1", b"10")
UNPACED: Final = (1 << 64) - 1
"""A pace without a limit; 0 is a pause."""


@functools.cache
def _eight_slots(value: int) -> list[bytes]:
    """Return the slots that each byte of a bitmap stands for."""
    return [bytes(value if byte >> bit & 1 else 0 for bit in range(8)) for byte in range(256)]


def spread(bits: bytes | memoryview, value: int = 1) -> bytes:
    """Return a byte, 0 or `value`, for each bit of a bitmap, the lowest of each byte first."""
    slots = _eight_slots(value)
    parts = []
    for at in range(0, len(bits), _PART):
        part = bytes(bits[at : at + _PART])
        if not part.strip(b"\0"):
            parts.append(bytes(8 * len(part)))
        elif not part.strip(b"\xff"):
            parts.append(bytes((value,)) * (8 * len(part)))
        else:
            parts.append(b"".join(map(slots.__getitem__, part)))
    return b"".join(parts)


class Slots:
    """The row of all pages of all areas.  sizes are in pages."""

    def __init__(self, sizes: Sequence[int]) -> None:
        """Number the pages of areas with these sizes."""
        self.sizes: Final = tuple(sizes)
        self.bases: Final = tuple(accumulate(self.sizes, initial=0))
        self.total: Final = self.bases[-1]

    def slot(self, area: int, pgoff: int) -> int:
        """Return the slot of a page."""
        return self.bases[area] + pgoff

    def area_of(self, slot: int) -> int:
        """Return the index of the area that a slot belongs to."""
        for area, base in enumerate(self.bases[1:]):
            if slot < base:
                return area
        raise ValueError(f"slot {slot} of {self.total}")


class ClaimMap:
    """The map, as one process sees it."""

    def __init__(self, memory: SharedMemory, slots: Slots) -> None:
        """Own the memory from now on; slots tells what it is a map of."""
        if memory.size != _HEAD + slots.total:
            raise ValueError(f"claim map of {memory.size} bytes for {slots.total} pages")
        self.memory = memory
        self.slots: Final = slots
        self._lock = ProcessLock(memory.fd)

    @classmethod
    def create(cls, slots: Slots) -> ClaimMap:
        """Make a map in which every page is free."""
        claims = cls(SharedMemory.create("claims", _HEAD + slots.total), slots)
        claims.pace = UNPACED
        return claims

    @classmethod
    def attach(cls, fd: int, slots: Slots) -> ClaimMap:
        """Map one that another process made; fd is owned from now on."""
        return cls(SharedMemory.attach(fd), slots)

    def close(self) -> None:
        """Unmap; again is harmless."""
        self._lock.close()
        self.memory.close()

    # --- the cursor ---

    @property
    def cursor(self) -> int:
        """Return the slot at which the background transfer goes on."""
        (slot,) = _NUMBER.unpack_from(self.memory.map, _CURSOR_AT)
        return int(slot) if slot < self.slots.total else 0

    @cursor.setter
    def cursor(self, slot: int) -> None:
        _NUMBER.pack_into(self.memory.map, _CURSOR_AT, slot)

    # --- the pace ---

    @property
    def pace(self) -> int:
        """Return how fast each background lane may send, in bytes per second."""
        (pace,) = _NUMBER.unpack_from(self.memory.map, _PACE_AT)
        return int(pace)

    @pace.setter
    def pace(self, bytes_s: int) -> None:
        _NUMBER.pack_into(self.memory.map, _PACE_AT, bytes_s)

    # --- what the background lanes tell each other ---

    @property
    def window(self) -> int:
        """Return how many bytes all background lanes together may have on their way."""
        (size,) = _NUMBER.unpack_from(self.memory.map, _WINDOW_AT)
        return int(size)

    @window.setter
    def window(self, nr_bytes: int) -> None:
        _NUMBER.pack_into(self.memory.map, _WINDOW_AT, nr_bytes)

    def tell(self, lane: int, on_way: int, acked: int) -> None:
        """Tell what a lane has on its way, and what its peer has acknowledged so far, in bytes."""
        _LANE.pack_into(self.memory.map, _LANES_AT + lane * _LANE.size, on_way, acked)

    def told(self) -> tuple[int, int]:
        """Return the sums of what all lanes told: (on their way, acknowledged)."""
        numbers = _LANES.unpack_from(self.memory.map, _LANES_AT)
        return sum(numbers[0::2]), sum(numbers[1::2])

    # --- claiming ---

    def claim(self, slots: Iterable[int]) -> list[int]:
        """Claim single slots for a request and move the cursor behind the last one.

        Returns those that were free.
        """
        mine = []
        data = self.memory.map
        with self._lock:
            for slot in slots:
                if not data[_HEAD + slot]:
                    data[_HEAD + slot] = 1
                    mine.append(slot)
            if mine:
                self.cursor = mine[-1] + 1
        return mine

    def claim_range(self, start: int, count: int) -> list[tuple[int, int]]:
        """Claim what is free within a range.  Returns it as ranges (first slot, count)."""
        mine = []
        data = self.memory.map
        at, end = _HEAD + start, _HEAD + start + count
        with self._lock:
            while (at := data.find(_FREE, at, end)) >= 0:
                stop = data.find(b"\1", at, end)
                stop = end if stop < 0 else stop
                data[at:stop] = b"\1" * (stop - at)
                mine.append((at - _HEAD, stop - at))
                at = stop
        return mine

    def claim_runs(self, longest: int, most: int = 1) -> list[tuple[int, int]]:
        """Claim the next `most` runs of free slots from the cursor on, of at most `longest` slots
        together, within one area and not far from each other.

        Returns them as (first slot, count); empty when no slot is free any more.
        """
        data = self.memory.map
        while True:
            # The search may pass over a long stretch of pages that were sent: not under the lock,
            # since a request waits for that.
            cursor = self.cursor
            start = self._find_free(cursor)
            if start is None:
                return []
            end = _HEAD + self.slots.bases[self.slots.area_of(start) + 1]
            at, far = _HEAD + start, min(end, _HEAD + start + _SPREAD * longest)
            runs: list[tuple[int, int]] = []
            with self._lock:
                if data[at]:
                    continue
                while longest and len(runs) < most and (at := data.find(_FREE, at, far)) >= 0:
                    stop = data.find(b"\1", at, min(at + longest, end))
                    stop = min(at + longest, end) if stop < 0 else stop
                    data[at:stop] = b"\1" * (stop - at)
                    runs.append((at - _HEAD, stop - at))
                    longest -= stop - at
                    at = stop
                # A request that came meanwhile has moved it to where it matters more.
                if self.cursor == cursor:
                    self.cursor = sum(runs[-1])
            return runs

    def know(self, start: int, count: int, bits: bytes | memoryview) -> None:
        """Set `count` slots from `start` on to what a bitmap says, its bits from the lowest of each
        byte on: 1 is claimed.  Only while no lane claims.
        """
        self.memory.map[_HEAD + start : _HEAD + start + count] = spread(bits)[:count]

    def take_free(self) -> int:
        """Claim every free slot, and return them as a whole number with a bit for each slot."""
        data = self.memory.map
        with self._lock:
            found = bytes(memoryview(data)[_HEAD : _HEAD + self.slots.total])
            data[_HEAD : _HEAD + self.slots.total] = b"\1" * self.slots.total
        return int(found.translate(_FREE_DIGITS)[::-1], 2)

    def _find_free(self, cursor: int) -> int | None:
        data = self.memory.map
        at = data.find(_FREE, _HEAD + cursor)
        if at < 0:
            at = data.find(_FREE, _HEAD, _HEAD + cursor)
        return None if at < 0 else at - _HEAD

    def claimed(self) -> int:
        """Return how many slots are claimed.  Reads the whole map."""
        return bytes(memoryview(self.memory.map)[_HEAD:]).count(1)
