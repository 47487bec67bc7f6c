# SPDX-License-Identifier: GPL-2.0-or-later
"""What Prometheus gets, from a real server."""

from __future__ import annotations

import asyncio
import socket
import urllib.error
import urllib.request
from array import array
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pyumem import metrics
from pyumem.address import Address
from pyumem.area import Area
from pyumem.arrival import DriverCounts, Sample, Snapshot
from pyumem.errors import UsageError
from pyumem.hello import AreaSpec
from pyumem.incoming import IncomingRequest, IncomingVm
from pyumem.serve import Daemon
from pyumem.stats import NR_BUCKETS, Totals, bucket_of
from pyumem.tls import Security
from pyumem.verdicts import Verdicts

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read()
    assert isinstance(text, bytes)
    return text.decode()


def served(take: Callable[[], Snapshot]) -> str:
    async def main() -> str:
        async with metrics.serve(Address("127.0.0.1", 0), take) as port:
            return await asyncio.to_thread(scrape, port)

    return asyncio.run(main())


def lane(*latencies_ns: int, **more: int) -> Totals:
    buckets = [0] * NR_BUCKETS
    for ns in latencies_ns:
        buckets[bucket_of(ns)] += 1
    return Totals(buckets=buckets, latency_max_ns=max(latencies_ns, default=0), **more)


def sample() -> Sample:
    return Sample(
        vm="vm1",
        state="postcopy-active",
        ram_bytes=1 << 20,
        resident_bytes=1 << 19,
        lanes={
            "urgent-0": lane(10_000, 200_000, pages=4, bytes_received=5000, requests=3),
            "background-0": lane(3_000_000, pages=5, zero_pages=1, bytes_received=100),
            "background-1": lane(pages=6, zero_pages=1, bytes_received=200),
        },
        recoveries=2,
        driver=DriverCounts(faults_major=9, faults_duplicate=4, blocked_ms=1250.0),
    )


def test_a_scrape_tells_everything() -> None:
    text = served(lambda: Snapshot([sample()], {"completed": 3, "postcopy-paused": 1}))
    found: Samples = {
        (each.name, tuple(sorted(each.labels.items()))): each.value
        for family in text_string_to_metric_families(text)
        for each in family.samples
    }

    def value(name: str, **labels: str) -> float:
        return found[name, tuple(sorted(labels.items()))]

    vm = {"vm": "vm1"}
    assert value("umem_ram_bytes", **vm) == 1 << 20
    assert value("umem_resident_bytes", **vm) == 1 << 19
    assert value("umem_recoveries_total", **vm) == 2
    assert value("umem_faults_total", **vm) == 9
    assert value("umem_duplicate_faults_total", **vm) == 4
    assert value("umem_blocked_seconds_total", **vm) == 1.25
    assert value("umem_received_bytes_total", lane="background", **vm) == 300
    assert value("umem_received_pages_total", lane="background", kind="data", **vm) == 11
    assert value("umem_received_pages_total", lane="background", kind="zero", **vm) == 2
    assert value("umem_received_pages_total", lane="urgent", kind="data", **vm) == 4
    assert value("umem_requested_pages_total", **vm) == 3
    assert value("umem_prefetched_pages_total", **vm) == 2
    states = {
        labels[0][1]: on for (name, labels), on in found.items() if name == "umem_migration_state"
    }
    assert states.pop("postcopy-active") == 1 and set(states.values()) == {0}
    assert {"waiting", "failed", "postcopy-paused"} <= states.keys()
    assert value("umem_migrations_total", state="completed") == 3
    assert value("umem_migrations_total", state="postcopy-paused") == 1
    assert value("umem_migrations_total", state="failed") == 0
    assert value("umem_demand_latency_seconds_count", **vm) == 3
    assert value("umem_demand_latency_seconds_sum", **vm) == pytest.approx(0.00321, rel=1 / 32)
    buckets = [
        (float(dict(labels)["le"]), count)
        for (name, labels), count in found.items()
        if name == "umem_demand_latency_seconds_bucket"
    ]
    for limit, count in buckets:
        assert count == sum(ns <= limit for ns in (10e-6, 200e-6, 3e-3)), limit
    assert len(buckets) > 15


class FakeArea:
    name, node, size, granule_size = "vm1.ram0", "/dev/umem7", 128 * 4096, 4096

    def info(self) -> object:
        return SimpleNamespace(size=self.size, nr_cached=64, granule_size=4096)

    def stats(self) -> object:
        return SimpleNamespace(nr_major=2, nr_duplicate=1, blocked_ns=1_500_000)

    def bitmap(self) -> array[int]:
        return array("Q", [(1 << 64) - 1, 0])


def test_a_daemon_with_a_vm_that_waits(tmp_path: Path) -> None:
    request = IncomingRequest(
        name="vm1",
        address=Address("127.0.0.1", 4444),
        blocks=(AreaSpec("ram0", FakeArea.size, 4096),),
        qmp=tmp_path / "qmp.sock",
        incoming=tmp_path / "incoming.sock",
        autostart=True,
        touch=False,
    )
    vm = IncomingVm(request, Security(), None, None, Verdicts())
    vm._areas = cast(list[Area], [FakeArea()])
    daemon = Daemon(Security())
    daemon._vms["vm1"] = vm
    text = served(daemon._snapshot)
    for line in (
        'umem_ram_bytes{vm="vm1"} 524288.0',
        'umem_resident_bytes{vm="vm1"} 262144.0',
        'umem_migration_state{umem_migration_state="starting",vm="vm1"} 1.0',
        'umem_faults_total{vm="vm1"} 2.0',
        'umem_blocked_seconds_total{vm="vm1"} 0.0015',
        'umem_demand_latency_seconds_count{vm="vm1"} 0.0',
    ):
        assert line in text, (line, text)
    told = vm.to_json(detail=True)
    assert told.pop("resident_map") == "9" * 30 + "0" * 30
    assert told.pop("demand_latency_histogram") == []
    assert told == vm.to_json()


def test_a_daemon_without_vms() -> None:
    text = served(lambda: Snapshot([], {}))
    assert 'umem_migrations_total{state="completed"} 0.0' in text
    assert "umem_info{version=" in text and 'vm="' not in text


def test_the_event_loop_is_free_while_it_is_scraped() -> None:
    """A client that connects and says nothing keeps neither the loop nor another client waiting."""

    async def main() -> str:
        async with metrics.serve(Address("127.0.0.1", 0), lambda: Snapshot([], {})) as port:
            with socket.create_connection(("127.0.0.1", port)):
                return await asyncio.wait_for(asyncio.to_thread(scrape, port), 10)

    assert "umem_info" in asyncio.run(main())


def test_an_error_of_ours_is_the_scrapers_and_not_the_daemons() -> None:
    def broken() -> Snapshot:
        raise ValueError("no")

    with pytest.raises(urllib.error.HTTPError):
        served(broken)


def test_a_port_that_is_taken() -> None:
    async def main(port: int) -> None:
        async with metrics.serve(Address("127.0.0.1", port), lambda: Snapshot([], {})):
            pass

    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UsageError) as error:
        asyncio.run(main(taken.getsockname()[1]))
    assert "--metrics tcp:127.0.0.1:" in str(error.value)
