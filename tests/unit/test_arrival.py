# SPDX-License-Identifier: GPL-2.0-or-later
"""The destination's report, from a migration that ends until it is a file."""

from __future__ import annotations

import asyncio
import errno
from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from pyumem import reports
from pyumem.address import Address
from pyumem.area import Area
from pyumem.destination import Migration, Target
from pyumem.errors import DriverError
from pyumem.greeting import AsyncLink
from pyumem.hello import AreaSpec, Hello, Lane
from pyumem.incoming import IncomingRequest, IncomingVm
from pyumem.qemu import Qemu
from pyumem.report import State, arrival_report
from pyumem.stats import Counter, StatsBlock, Totals
from pyumem.tls import LaneSecurity, Security
from pyumem.verdicts import Verdicts
from pyumem.workers import Worker

PAGES = 64
AREAS = (AreaSpec("ram0", PAGES * 4096, 4096),)
HELLO = Hello(Lane.CONTROL, "0" * 32, "vm1", "ab" * 32, "umem", background_lanes=2, areas=AREAS)


class FakeArea:
    """Counts one fault more whenever it is asked, as long as it is open."""

    name, node, npages, size, granule_size = "vm1.ram0", "/dev/umem7", PAGES, PAGES * 4096, 4096

    def __init__(self) -> None:
        self.faults = 0
        self.closed = False

    def info(self) -> object:
        return SimpleNamespace(complete=True, nr_cached=PAGES, size=self.size, granule_size=4096)

    def stats(self) -> object:
        if self.closed:
            raise DriverError("UMEM_GET_STATS", errno.EBADF, area=self.name)
        self.faults += 1
        return SimpleNamespace(nr_major=self.faults, nr_duplicate=1, blocked_ns=2_500_000)

    def bitmap(self) -> array[int]:
        return array("Q", [(1 << PAGES) - 1])

    def page_bitmap(self) -> array[int]:
        return self.bitmap()

    def close(self) -> None:
        self.closed = True


class FakeWorker:
    """A lane that has brought something."""

    pid = 0

    def __init__(self, pages: int, zero: int, nr_bytes: int, *latencies_ns: int) -> None:
        self._stats = StatsBlock.create("fake")
        for counter, n in (
            (Counter.PAGES, pages),
            (Counter.ZERO_PAGES, zero),
            (Counter.BYTES_RECEIVED, nr_bytes),
            (Counter.REQUESTS, len(latencies_ns)),
        ):
            self._stats.add(counter, n)
        for ns in latencies_ns:
            self._stats.latency(ns)
        self.stopped = False

    def totals(self) -> Totals:
        return self._stats.read()

    async def stop(self) -> None:
        self.stopped = True

    def close(self) -> None:
        self._stats.close()


def migration_of(area: FakeArea, before: Migration | None = None) -> Migration:
    target = Target(
        name="vm1",
        areas=cast(list[Area], [area]),
        qemu=cast(Qemu, SimpleNamespace()),
        incoming=Path("/in"),
        autostart=True,
        touch=False,
        on_phase=lambda _phase: None,
        started=asyncio.Event(),
    )
    link = cast(AsyncLink, SimpleNamespace(peer="[fd00::1]:4000", close=lambda: None))
    security = LaneSecurity(b"")
    return Migration(target, HELLO, link, security, before=before, resumed=before is not None)


def fill(migration: Migration) -> list[FakeWorker]:
    lanes = {
        (Lane.URGENT, 0): FakeWorker(6, 1, 100, 20_000, 300_000, 300_000),
        (Lane.BACKGROUND, 0): FakeWorker(20, 10, 2000, 900_000),
        (Lane.BACKGROUND, 1): FakeWorker(20, 7, 3000),
    }
    migration._lanes = cast(dict[tuple[Lane, int], Worker | None], dict(lanes))
    return list(lanes.values())


def test_the_report_adds_up() -> None:
    async def main() -> None:
        migration = migration_of(FakeArea())
        fill(migration)
        migration.state = State.COMPLETED
        migration._committed_at, migration._resident_at = 10.0, 12.5
        told = migration.report().to_json()
        await migration.close()
        migration.free()
        assert told["bytes_received_by_lane"] == {
            "control": 0,
            "urgent-0": 100,
            "background-0": 2000,
            "background-1": 3000,
        }
        assert told["bytes_received"] == 5100
        kinds = ("demand", "background", "zero", "uncounted")
        assert sum(told[f"pages_{kind}"] for kind in kinds) == told["pages_total"] == PAGES
        # 7 came on the urgent lane and 3 of them were asked for; the fourth came in background.
        assert told["pages_prefetched"] == 4 and told["requests"] == 3
        assert [one["requests"] for one in told["demand_latency_histogram"] if one["requests"]] == [
            *(1, 2, 1)
        ]
        assert told["demand_latency_max_us"] == 900
        assert told["time_to_resident_s"] == 2.5 and told["blocked_ms"] == 2.5
        assert told["state"] == "completed" and told["peer"] == "[fd00::1]:4000"

    asyncio.run(main())


def test_what_a_lost_connection_brought_is_counted_still() -> None:
    async def main() -> None:
        area = FakeArea()
        first = migration_of(area)
        fill(first)
        first._committed_at, first._device_bytes = 10.0, 77
        await first.close()
        second = migration_of(area, first)
        first.free()
        fill(second)
        told = second.report().to_json()
        status = second.to_json()
        await second.close()
        second.free()
        assert told["bytes_received_by_lane"]["background-1"] == 6000
        assert told["bytes_received_by_lane"]["control"] == 77
        assert told["pages_demand"] == 12 and told["time_to_resident_s"] is None
        assert status["pages_demand"] == 12
        urgent, background = second._past["urgent-0"], second._past["background-0"]
        assert arrival_report(urgent, background)["pages_demand"] == 6

    asyncio.run(main())


def test_a_vm_that_is_released_leaves_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UMEM_RUNTIME_DIR", str(tmp_path / "run"))

    async def main() -> None:
        request = IncomingRequest(
            name="vm1",
            address=Address("127.0.0.1", 4444),
            blocks=AREAS,
            qmp=tmp_path / "qmp.sock",
            incoming=tmp_path / "incoming.sock",
            autostart=True,
            touch=False,
        )
        area = FakeArea()
        vm = IncomingVm(request, Security(), None, None, Verdicts())
        vm._areas = cast(list[Area], [area])
        vm.migration = migration_of(area)
        workers = fill(vm.migration)
        vm.migration.state, vm.migration.reason = State.FAILED, "the source closed"
        await vm._release()
        assert area.closed and all(worker.stopped for worker in workers)
        (kept,) = reports.read("vm1")
        assert kept["side"] == "destination" and kept["state"] == "failed"
        assert kept["error"] == "the source closed" and kept["pages_demand"] == 6
        # The daemon's history is written when the areas are closed.
        history = vm.migration.to_json()
        assert kept["faults_major"] == history["faults_major"] == area.faults > 0
        vm.migration.free()

    asyncio.run(main())
