# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon's numbers for Prometheus: `umemctl serve --metrics tcp:HOST:PORT`.

Requests are answered by threads of prometheus-client's server, so that a slow one keeps nobody
waiting. The numbers are gathered in the daemon's event loop, where they are written: that is some
ioctls and copies of counters, and waits for nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Final

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
    StateSetMetricFamily,
)
from prometheus_client.registry import Collector

import pyumem
from pyumem import latency
from pyumem.address import Address
from pyumem.arrival import Sample, Snapshot, latencies, prefetched
from pyumem.errors import UsageError
from pyumem.hello import Lane
from pyumem.report import State
from pyumem.stats import Totals

_GATHER_S: Final = 5.0
_STATES: Final = ("starting", "waiting", *State)


class _Collector(Collector):
    """Gathers at each request."""

    def __init__(self, take: Callable[[], Snapshot]) -> None:
        self._take = take

    def collect(self) -> Iterator[Metric]:
        """Return all metrics."""
        told = self._take()
        yield InfoMetricFamily("umem", "The daemon.", {"version": pyumem.__version__})
        yield _ended(told.ended)
        yield from _of_vms(told.samples)
        yield from _of_lanes(told.samples)

    def describe(self) -> list[Metric]:
        """Nothing: the registry need not collect to learn the names, as the loop waits for it."""
        return []


def _ended(ended: Mapping[str, int]) -> Metric:
    metric = CounterMetricFamily(
        "umem_migrations", "Migrations to this host that are over.", labels=["state"]
    )
    for state in State:
        if state.over or state in ended:
            metric.add_metric([state], ended.get(state, 0))
    return metric


def _of_vms(samples: Sequence[Sample]) -> Iterator[Metric]:
    states = StateSetMetricFamily(
        "umem_migration_state", "State of the VM's migration.", labels=["vm"]
    )
    ram = GaugeMetricFamily("umem_ram_bytes", "The VM's memory.", labels=["vm"])
    resident = GaugeMetricFamily(
        "umem_resident_bytes", "What of the VM's memory is here.", labels=["vm"]
    )
    recoveries = CounterMetricFamily(
        "umem_recoveries", "How often the source came back after the commit.", labels=["vm"]
    )
    faults = CounterMetricFamily(
        "umem_faults", "Faults that slept for missing memory.", labels=["vm"]
    )
    duplicate = CounterMetricFamily(
        "umem_duplicate_faults",
        "Faults whose memory another one had asked for already.",
        labels=["vm"],
    )
    blocked = CounterMetricFamily(
        "umem_blocked_seconds", "How long faults slept, all together.", labels=["vm"]
    )
    for one in samples:
        states.add_metric([one.vm], {state: state == one.state for state in _STATES})
        for metric, value in (
            (ram, one.ram_bytes),
            (resident, one.resident_bytes),
            (recoveries, one.recoveries),
            (faults, one.driver.faults_major),
            (duplicate, one.driver.faults_duplicate),
            (blocked, one.driver.blocked_ms / 1000),
        ):
            metric.add_metric([one.vm], value)
    yield from (states, ram, resident, recoveries, faults, duplicate, blocked)


def _of_lanes(samples: Sequence[Sample]) -> Iterator[Metric]:
    nr_bytes = CounterMetricFamily(
        "umem_received_bytes", "Bytes that came on page lanes.", labels=["vm", "lane"]
    )
    pages = CounterMetricFamily(
        "umem_received_pages",
        "Pages that came: with their content, or told to be zero.",
        labels=["vm", "lane", "kind"],
    )
    requests = CounterMetricFamily("umem_requested_pages", "Pages asked for.", labels=["vm"])
    unasked = CounterMetricFamily(
        "umem_prefetched_pages",
        "Pages on the urgent lane that nobody had asked for.",
        labels=["vm"],
    )
    waits = HistogramMetricFamily(
        "umem_demand_latency_seconds",
        "From reading a request off the driver until its page was marked; the sum is within 1/32.",
        labels=["vm"],
    )
    for one in samples:
        for lane in (Lane.URGENT, Lane.BACKGROUND):
            of_kind = _of_kind(one, lane)
            nr_bytes.add_metric([one.vm, lane], of_kind.bytes_received)
            pages.add_metric([one.vm, lane, "data"], of_kind.pages)
            pages.add_metric([one.vm, lane, "zero"], of_kind.zero_pages)
        requests.add_metric([one.vm], _of_kind(one, Lane.URGENT).requests)
        unasked.add_metric([one.vm], prefetched(_of_kind(one, Lane.URGENT)))
        both = latencies(one.lanes)
        waits.add_metric([one.vm], _cumulative(both), latency.sum_s(both))
    yield from (nr_bytes, pages, requests, unasked, waits)


def _of_kind(sample: Sample, lane: Lane) -> Totals:
    found = (totals for name, totals in sample.lanes.items() if name.startswith(lane))
    return sum(found, Totals())


def _cumulative(totals: Totals) -> list[tuple[str, float]]:
    limits = [*(str(ns / 1e9) for ns in latency.LIMITS_NS), "+Inf"]
    told, seen = [], 0
    for limit, count in zip(limits, latency.counts(totals), strict=True):
        seen += count
        told.append((limit, float(seen)))
    return told


@contextlib.asynccontextmanager
async def serve(address: Address, take: Callable[[], Snapshot]) -> AsyncIterator[int]:
    """Answer on an address, the first one that its host stands for, while the context lasts.

    take is called in this event loop.  Gives the port.

    Raises UsageError when the address cannot be had.
    """
    loop = asyncio.get_running_loop()

    async def on_loop() -> Snapshot:
        return take()

    def gather() -> Snapshot:
        return asyncio.run_coroutine_threadsafe(on_loop(), loop).result(_GATHER_S)

    registry = CollectorRegistry()
    registry.register(_Collector(gather))
    try:
        server, thread = start_http_server(address.port, address.host or "0.0.0.0", registry)
    except OSError as e:
        raise UsageError(f"--metrics {address}: {e.strerror or e}") from e
    try:
        yield server.server_port
    finally:
        await asyncio.to_thread(server.shutdown)
        server.server_close()
        await asyncio.to_thread(thread.join)
