# SPDX-License-Identifier: GPL-2.0-or-later
"""What a migration is told to have been: its states, its progress while it runs, its report at the
end.

Every number that leaves the program has its unit in its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any

from pyumem.stats import Totals


class State(StrEnum):
    """States of a migration, on either side."""

    SETUP = "setup"  # lanes are being connected
    PRECOPY_ACTIVE = "precopy-active"  # rounds, while the VM runs at the source
    DEVICE = "device"  # device state is on its way; the VM may stop
    POSTCOPY_ACTIVE = "postcopy-active"  # committed: the VM runs at the destination, pages flow
    POSTCOPY_PAUSED = "postcopy-paused"  # committed, but pages do not flow: the guest waits
    POSTCOPY_RECOVER = "postcopy-recover"  # connected again; what is missing is being found out
    COMPLETED = "completed"
    FAILED = "failed"  # before the commit: the VM runs at the source
    CANCELLED = "cancelled"  # the same, on somebody's wish

    @property
    def committed(self) -> bool:
        """Tell whether only the destination may run the VM."""
        return self in (
            State.POSTCOPY_ACTIVE,
            State.POSTCOPY_PAUSED,
            State.POSTCOPY_RECOVER,
            State.COMPLETED,
        )

    @property
    def over(self) -> bool:
        """Tell whether nothing more will happen."""
        return self in (State.COMPLETED, State.FAILED, State.CANCELLED)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far it is.

    Pages are host pages; bytes_moved are those on the page lanes, towards the destination.
    """

    state: State
    pages_total: int
    pages_demand: int
    pages_background: int
    pages_zero: int
    pages_uncounted: int
    """Pages at the destination that these numbers lack, after a recovery by another process, less
    those that they have twice, since they were lost on the way.
    """
    bytes_moved: int
    elapsed_s: float

    @property
    def pages_done(self) -> int:
        """Return how many pages need not be sent any more."""
        return self.pages_demand + self.pages_background + self.pages_zero + self.pages_uncounted

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {**asdict(self), "pages_done": self.pages_done}


@dataclass(slots=True)
class Report:
    """The end of a migration, as the source tells it."""

    vm: str
    destination: str
    session: str
    state: State
    error: str = ""
    downtime_ms: float | None = None
    """From the source's STOP event until the destination said that the VM runs."""
    downtime_parts_ms: dict[str, float] = field(default_factory=dict)
    """What it was for, one after the other: drain (until QEMU says that its I/O is drained),
    last_round (what of the rounds remains is sent, or told, while QEMU saves its device state),
    device_state (until all of that is out), load (until the destination has loaded it), commit
    (until the VM runs there).
    """
    time_to_resident_s: float | None = None
    """From the STOP event until every page was at the destination."""
    total_s: float = 0.0
    setup_s: float | None = None
    """From the start until every lane was connected and its process ready."""
    commit_ms: float | None = None
    """From COMMIT until the destination's answer."""
    stopped_at: str = ""
    """When the source's vCPUs stopped and were free for others; empty for a VM that stood still."""
    committed_at: str = ""
    ram_bytes: int = 0
    page_size_bytes: int = 0
    pages_total: int = 0
    pages_demand: int = 0
    pages_prefetched: int = 0
    """Of pages_demand and pages_zero: neighbours that the guest had not touched."""
    pages_background: int = 0
    pages_zero: int = 0
    pages_released: int = 0
    """Given back at the source before the end, with --release-ram."""
    requests: int = 0
    demand_latency_p50_us: float | None = None
    """Latencies are the destination's: from reading the request off the driver to the mark."""
    demand_latency_p99_us: float | None = None
    demand_latency_max_us: float | None = None
    faults_major: int = 0
    """The destination's driver's: faults that slept for a missing page."""
    faults_duplicate: int = 0
    """Those whose page another fault had asked for already."""
    blocked_ms: float | None = None
    """How long all of them slept, together."""
    bytes_sent_by_lane: dict[str, int] = field(default_factory=dict)
    bytes_before_compression: int = 0
    """Content of background and pre-copy lanes that went compressed."""
    bytes_after_compression: int = 0
    device_state_bytes: int = 0
    precopy: dict[str, Any] = field(default_factory=dict)
    """Rounds of pre-copy, if there were any: see pyumem.precopy.Rounds."""
    recoveries: int = 0
    """How often it was taken up again after the commit."""
    guest_ended: str = ""
    """Why the VM ended at the destination before every page was there; empty if it did not."""

    @property
    def bytes_sent(self) -> int:
        """Return the bytes of all lanes."""
        return sum(self.bytes_sent_by_lane.values())

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {**asdict(self), "bytes_sent": self.bytes_sent}


def report_of(told: Mapping[str, Any]) -> Report:
    """Return the report that to_json() made this of, as far as this version knows its fields.

    Raises ValueError, TypeError.
    """
    known = {each.name: told[each.name] for each in fields(Report) if each.name in told}
    return Report(**{**known, "state": State(told.get("state", ""))})


def totals_of(blocks: Iterable[Totals]) -> Totals:
    """Add up the blocks of several workers."""
    return sum(blocks, Totals())


def arrival_report(urgent: Totals, background: Totals) -> dict[str, Any]:
    """Return what the destination tells of the pages that came."""
    both = urgent + background
    return {
        "pages_demand": urgent.pages,
        "pages_background": background.pages,
        "pages_zero": both.zero_pages,
        "requests": urgent.requests,
        "memory_waits": both.memory_waits,
        "demand_latency_p50_us": both.percentile_us(0.50),
        "demand_latency_p99_us": both.percentile_us(0.99),
        "demand_latency_max_us": both.max_us,
        "bytes_received_urgent": urgent.bytes_received,
        "bytes_received_background": background.bytes_received,
    }


_MAX_INT = 1 << 63
_ARRIVED = (
    "demand_latency_p50_us",
    "demand_latency_p99_us",
    "demand_latency_max_us",
    "blocked_ms",
)
_ARRIVED_COUNTS = ("requests", "faults_major", "faults_duplicate")


def take_arrival(report: Report, told: Mapping[str, Any]) -> None:
    """Take over what only the destination knows, as far as it has the right form."""
    for name in _ARRIVED:
        value = told.get(name)
        if isinstance(value, float) or (type(value) is int and abs(value) < _MAX_INT):
            setattr(report, name, float(value))
    for name in _ARRIVED_COUNTS:
        count = told.get(name)
        if type(count) is int and 0 <= count < _MAX_INT:
            setattr(report, name, count)
    ended = told.get("guest_ended")
    if isinstance(ended, str):
        report.guest_ended = ended[:256]
