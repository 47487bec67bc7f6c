# SPDX-License-Identifier: GPL-2.0-or-later
"""How a migration looks while it runs, on a terminal and in a log, and the table at its end."""

from __future__ import annotations

import asyncio
import sys
import time
from collections import deque
from types import TracebackType
from typing import Final, Protocol, Self

import click

from pyumem.cli.common import plain, share, size
from pyumem.ram import PAGE_SIZE
from pyumem.report import Progress, Report

_WINDOW_S: Final = 3.0
"""Seconds over which the rate is told."""


class Watched(Protocol):
    """What is displayed."""

    def progress(self) -> Progress:
        """Return how far it is."""


class Rate:
    """Bytes a second, and pages a second, over the last seconds."""

    def __init__(self) -> None:
        """Begin with nothing seen."""
        self._seen: deque[tuple[float, int, int]] = deque()

    def see(self, now: Progress) -> None:
        """Take note."""
        at = time.monotonic()
        self._seen.append((at, now.bytes_moved, now.pages_done))
        while len(self._seen) > 2 and at - self._seen[0][0] > _WINDOW_S:
            self._seen.popleft()

    def _per_second(self, column: int) -> float:
        if len(self._seen) < 2:
            return 0.0
        first, last = self._seen[0], self._seen[-1]
        return (last[column] - first[column]) / max(last[0] - first[0], 1e-6)

    @property
    def bytes(self) -> float:
        """Return bytes a second."""
        return self._per_second(1)

    def eta_s(self, now: Progress) -> float | None:
        """Return how many seconds are left, None when nothing moves."""
        rate = self._per_second(2)
        return (now.pages_total - now.pages_done) / rate if rate > 0 else None


def _line(now: Progress, rate: Rate) -> str:
    eta = rate.eta_s(now)
    return (
        f"{now.state}: {now.pages_done}/{now.pages_total} pages "
        f"({share(now.pages_done, now.pages_total)}), "
        f"demand {now.pages_demand}, background {now.pages_background}, zero {now.pages_zero}, "
        f"{size(now.bytes_moved)} at {size(rate.bytes)}/s, "
        f"ETA {f'{eta:.0f} s' if eta is not None else '-'}"
    )


class PlainDisplay:
    """A line each second, for logs and pipes.  All of it goes to standard error."""

    def __enter__(self) -> Self:
        """Nothing to begin."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Nothing to end."""

    def tell(self, text: str) -> None:
        """Print a line."""
        click.echo(f"umemctl: {plain(text)}", err=True)

    def fail(self, text: str) -> None:
        """Print why it failed."""
        self.tell(text)

    async def follow(self, watched: Watched) -> None:
        """Print progress until cancelled."""
        rate = Rate()
        while True:
            await asyncio.sleep(1.0)
            now = watched.progress()
            rate.see(now)
            if now.pages_total:
                self.tell(_line(now, rate))


class Display(Protocol):
    """What shows a migration: a context manager."""

    def __enter__(self) -> Self:
        """Begin."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End."""

    def tell(self, text: str) -> None:
        """Print a line."""

    def fail(self, text: str) -> None:
        """Print why it failed."""

    async def follow(self, watched: Watched) -> None:
        """Show progress until cancelled."""


def make_display() -> Display:
    """Return what fits standard error."""
    if not sys.stderr.isatty():
        return PlainDisplay()
    # rich takes longer to import than the rest of this command together.
    from pyumem.cli.bar import BarDisplay

    return BarDisplay()


def faults_text(faults: int, blocked_ms: float | None) -> str:
    """Return how often the guest waited for memory, and for how long."""
    return "-" if blocked_ms is None else f"{faults}, {blocked_ms:.0f} ms together"


def number(value: float | None, unit: str, digits: int = 1) -> str:
    """Return a number with its unit; of an unknown one a dash."""
    return "-" if value is None else f"{value:.{digits}f} {unit}"


def show_report(report: Report) -> None:
    """Print the table at the end."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False)

    def row(label: str, value: object) -> None:
        # Text: an address in brackets is no markup.
        table.add_row(label, Text(plain(value)))

    row("VM", f"{report.vm} to {report.destination}")
    row("result", report.state.value)
    row("RAM", f"{size(report.ram_bytes)}, {report.pages_total} pages of {PAGE_SIZE} bytes")
    row("downtime", number(report.downtime_ms, "ms"))
    if report.downtime_ms is not None and report.downtime_parts_ms:
        parts = report.downtime_parts_ms.items()
        row("of it", ", ".join(f"{name.replace('_', ' ')} {ms:.0f} ms" for name, ms in parts))
    row("time to fully resident", number(report.time_to_resident_s, "s", 2))
    row("total time", number(report.total_s, "s", 2))
    if report.precopy:
        rounds, sent = len(report.precopy["rounds"]), report.precopy["sent_bytes"]
        row("pre-copy", f"{rounds} round(s), {size(sent)}: {report.precopy['reason']}")
    row("pages on demand", report.pages_demand)
    if report.pages_prefetched:
        row("of them and of zero pages prefetched", report.pages_prefetched)
    row("pages in background", report.pages_background)
    row("zero pages", report.pages_zero)
    latency = (
        report.demand_latency_p50_us,
        report.demand_latency_p99_us,
        report.demand_latency_max_us,
    )
    row("demand latency p50/p99/max", " / ".join(number(one, "us", 0) for one in latency))
    row("bytes sent", f"{size(report.bytes_sent)} (device state {size(report.device_state_bytes)})")
    if report.bytes_before_compression:
        before, after = report.bytes_before_compression, report.bytes_after_compression
        row("of them compressed", f"{size(after)}, from {size(before)} ({share(after, before)})")
    row("faults that waited", faults_text(report.faults_major, report.blocked_ms))
    if report.recoveries:
        row("taken up again", report.recoveries)
    if report.stopped_at:
        row("vCPUs stopped at", report.stopped_at)
    if report.committed_at:
        row("committed at", report.committed_at)
    if report.guest_ended:
        row("the VM ended", report.guest_ended)
    if report.error:
        row("error", report.error)
    Console().print(table)
