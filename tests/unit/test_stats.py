# SPDX-License-Identifier: GPL-2.0-or-later
"""Counters and the histogram of latencies."""

from __future__ import annotations

import os

from hypothesis import given
from hypothesis import strategies as st

from pyumem.stats import (
    NR_BUCKETS,
    SUBBUCKETS,
    Counter,
    StatsBlock,
    Totals,
    bucket_limit,
    bucket_of,
)

ns = st.integers(0, (1 << 64) - 1)


@given(ns)
def test_a_value_lies_in_its_bucket(value: int) -> None:
    bucket = bucket_of(value)
    assert 0 <= bucket < NR_BUCKETS
    assert value <= bucket_limit(bucket)
    if bucket:
        assert value > bucket_limit(bucket - 1)
    assert bucket_limit(bucket) - value <= value / SUBBUCKETS


def test_the_last_bucket_is_the_last_value() -> None:
    assert bucket_limit(NR_BUCKETS - 1) == (1 << 64) - 1
    assert bucket_of(1 << 70) == NR_BUCKETS - 1


@given(st.lists(st.integers(0, 10**10), min_size=1, max_size=200))
def test_percentiles_are_right_within_a_sixteenth(values: list[int]) -> None:
    block = StatsBlock.create("test")
    for value in values:
        block.latency(value)
    totals = block.read()
    block.close()
    values.sort()
    for share in (0.5, 0.99, 1.0):
        exact = values[max(1, -int(-share * len(values) // 1)) - 1]
        told = totals.percentile_us(share)
        assert told is not None
        assert exact / 1000 <= told <= exact / 1000 * (1 + 1 / SUBBUCKETS) + 0.001
    assert totals.max_us == values[-1] / 1000
    assert totals.latency_count == len(values)


def test_none_without_any() -> None:
    assert Totals().percentile_us(0.5) is None and Totals().max_us is None


def test_another_process_sees_it() -> None:
    block = StatsBlock.create("test")
    if pid := os.fork():
        assert os.waitpid(pid, 0)[1] == 0
    else:
        child = StatsBlock.attach(os.dup(block.memory.fd))
        for counter in Counter:
            child.add(counter, counter + 1)
        child.latency(5000)
        os._exit(0)
    totals = block.read()
    assert totals.pages == Counter.PAGES + 1
    assert totals.zero_pages == Counter.ZERO_PAGES + 1
    assert totals.bytes_sent == Counter.BYTES_SENT + 1
    assert totals.bytes_received == Counter.BYTES_RECEIVED + 1
    assert totals.requests == Counter.REQUESTS + 1
    assert totals.requests_stale == Counter.REQUESTS_STALE + 1
    assert totals.marked == Counter.MARKED + 1
    assert totals.latency_max_ns == 5000
    both = totals + totals
    assert both.pages == 2 * totals.pages and both.latency_max_ns == 5000
    assert both.latency_count == 2
    block.close()
    block.close()
