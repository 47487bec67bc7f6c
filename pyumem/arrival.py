# SPDX-License-Identifier: GPL-2.0-or-later
"""What a destination knows of a VM that comes: at any moment, and its report at the end."""

from __future__ import annotations

import contextlib
import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from pyumem import latency
from pyumem.area import Area
from pyumem.errors import DriverError
from pyumem.report import State, totals_of
from pyumem.stats import Totals
from pyumem.uapi import PAGE_SIZE

MAP_SHARES: Final = 60
"""Characters of the map of resident memory."""


@dataclass(frozen=True, slots=True)
class DriverCounts:
    """What the driver has counted of the guest's faults, in all areas of a VM."""

    faults_major: int = 0
    """Faults that slept for a missing granule."""
    faults_duplicate: int = 0
    """Those whose granule another fault had asked for already."""
    blocked_ms: float = 0.0
    """How long all of them slept, together: vCPUs, and QEMU's own threads."""

    @classmethod
    def of(cls, areas: Sequence[Area]) -> DriverCounts:
        """Add up what the driver says; of an area that it does not tell of, nothing."""
        found = []
        for area in areas:
            with contextlib.suppress(DriverError):
                found.append(area.stats())
        return cls(
            sum(one.nr_major for one in found),
            sum(one.nr_duplicate for one in found),
            round(sum(one.blocked_ns for one in found) / 1e6, 3),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Sample:
    """How far a VM is at one moment, as the daemon's metrics tell it."""

    vm: str
    state: str
    """A State, "starting" or "waiting"."""
    ram_bytes: int
    resident_bytes: int
    lanes: Mapping[str, Totals]
    """By the lane's name: KIND-INDEX."""
    recoveries: int
    driver: DriverCounts


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a daemon has to tell at one moment."""

    samples: Sequence[Sample]
    ended: Mapping[str, int]
    """How many migrations ended in each state since its start."""


def prefetched(urgent: Totals) -> int:
    """Return how many pages came on the urgent lane without having been asked for, zero ones among
    them: every other one has left its latency there.
    """
    return max(0, urgent.pages + urgent.zero_pages - urgent.latency_count)


def latencies(lanes: Mapping[str, Totals]) -> Totals:
    """Return the sum of all lanes: a requested page may come on any of them."""
    return totals_of(lanes.values())


def bytes_by_lane(lanes: Mapping[str, Totals]) -> dict[str, int]:
    """Return the bytes that came on each lane, headers included."""
    return {name: totals.bytes_received for name, totals in lanes.items()}


def resident_map(areas: Sequence[Area], shares: int = MAP_SHARES) -> str:
    """Return how much of each of so many equal parts of the VM's memory is here, areas one behind
    the other: 0 nothing, 9 all, 1 to 8 in between.

    It costs a copy of the driver's bitmaps, 32 KiB for each GiB; no guest memory is looked at.
    Raises DriverError.
    """
    bits = total = 0
    for area in areas:
        # Bit b of word w is granule 64 w + b: the words' own order, whatever the host's.
        words = area.bitmap()
        pages = area.size // area.granule_size
        if words.itemsize * 8 * len(words) < pages:
            raise ValueError(f"area {area.name}: {len(words)} words for {pages} granules")
        number = int.from_bytes(_little(words), "little") & ((1 << pages) - 1)
        bits |= number << total
        total += pages
    shares = min(shares, total)
    data = bits.to_bytes((total + 7) // 8, "little")
    return "".join(
        _digit(*_count(data, at * total // shares, (at + 1) * total // shares))
        for at in range(shares)
    )


def _little(words: array[int]) -> bytes:
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()


def _count(data: bytes, start: int, end: int) -> tuple[int, int]:
    """Return how many bits from start to end are set, and how many there are."""
    part = int.from_bytes(data[start // 8 : (end + 7) // 8], "little") >> start % 8
    return (part & ((1 << (end - start)) - 1)).bit_count(), end - start


def _digit(here: int, of: int) -> str:
    if here in (0, of):
        return "9" if here else "0"
    return str(1 + 8 * here // of)


@dataclass(slots=True)
class ArrivalReport:
    """The end of a migration, as the destination tells it.

    How long the VM stood still only the source knows.
    """

    vm: str
    source_vm: str
    peer: str
    session: str
    state: State
    error: str
    guest_ended: str
    """Why the VM ended before every page was there; empty if it did not."""
    total_s: float
    """From the first connection until now, or from the first that this daemon has seen."""
    time_to_resident_s: float | None
    """From COMMIT until every page was here; None if that did not come, or if COMMIT came to
    another daemon.
    """
    ram_bytes: int
    pages_total: int
    pages_demand: int
    pages_background: int
    pages_zero: int
    pages_prefetched: int
    """Of pages_demand and pages_zero: those that nobody had asked for here.

    Of a granule of several pages only the first one is asked for.
    """
    pages_uncounted: int
    """As in Progress."""
    requests: int
    memory_waits: int
    driver: DriverCounts
    latencies: Totals
    bytes_received_by_lane: dict[str, int]
    """The control lane's are the device state."""
    recoveries: int

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        told = {
            name: getattr(self, name)
            for name in self.__dataclass_fields__
            if name not in ("driver", "latencies")
        }
        return {
            **told,
            "page_size_bytes": PAGE_SIZE,
            **self.driver.to_json(),
            "demand_latency_p50_us": self.latencies.percentile_us(0.50),
            "demand_latency_p99_us": self.latencies.percentile_us(0.99),
            "demand_latency_max_us": self.latencies.max_us,
            "demand_latency_histogram": latency.to_json(self.latencies),
            "bytes_received": sum(self.bytes_received_by_lane.values()),
        }
