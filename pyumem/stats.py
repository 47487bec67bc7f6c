# SPDX-License-Identifier: GPL-2.0-or-later
"""Counters and a latency histogram in shared memory: a worker writes them, its parent reads them at
any time without asking.

Each block has one writer, so nothing is locked; a reader may be one event behind, which a display
does not mind. The histogram is log-linear: SUBBUCKETS buckets for each power of two of nanoseconds,
so that a percentile is told within 1/16.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

from pyumem.shm import SharedMemory

_SUB_BITS: Final = 4
SUBBUCKETS: Final = 1 << _SUB_BITS
NR_BUCKETS: Final = (64 - _SUB_BITS + 1) * SUBBUCKETS
_MAX_VALUE: Final = (1 << 64) - 1


class Counter(IntEnum):
    """What a lane counts, by its place in the block."""

    PAGES = 0  # pages whose content was sent or received
    ZERO_PAGES = 1  # pages told to be zero
    BYTES_SENT = 2  # on the wire, headers included
    BYTES_RECEIVED = 7
    REQUESTS = 3  # pages that were asked for
    REQUESTS_STALE = 4  # asked for when they were on their way already
    MARKED = 5  # granules that were missing before the mark
    LATENCY_MAX_NS = 6
    PREFETCHED = 9  # pages on the urgent lane that nobody had asked for, zero ones among them
    BYTES_BEFORE = 12  # of page content that went compressed: before that,
    BYTES_AFTER = 13  # and after it
    MEMORY_WAITS = 8  # times that a write found no memory and waited for some


_NR_COUNTERS: Final = 16  # room for more without a new layout
_WORDS: Final = _NR_COUNTERS + NR_BUCKETS
BLOCK_SIZE: Final = 8 * _WORDS
"""Bytes of one block."""


def bucket_of(value: int) -> int:
    """Return the bucket of a value in nanoseconds."""
    if value < SUBBUCKETS:
        return max(value, 0)
    value = min(value, _MAX_VALUE)
    shift = value.bit_length() - _SUB_BITS - 1
    return (shift << _SUB_BITS) + (value >> shift)


def bucket_limit(bucket: int) -> int:
    """Return the largest value in nanoseconds that falls into the bucket."""
    if bucket < SUBBUCKETS:
        return bucket
    shift = (bucket >> _SUB_BITS) - 1
    return ((bucket - (shift << _SUB_BITS) + 1) << shift) - 1


@dataclass(slots=True)
class Totals:
    """A copy of one block, or the sum of several."""

    pages: int = 0
    zero_pages: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    requests: int = 0
    requests_stale: int = 0
    marked: int = 0
    memory_waits: int = 0
    prefetched: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    latency_max_ns: int = 0
    buckets: list[int] = field(default_factory=lambda: [0] * NR_BUCKETS)

    def __add__(self, other: Totals) -> Totals:
        """Return the sum of two blocks, the longer of two longest."""
        return Totals(
            self.pages + other.pages,
            self.zero_pages + other.zero_pages,
            self.bytes_sent + other.bytes_sent,
            self.bytes_received + other.bytes_received,
            self.requests + other.requests,
            self.requests_stale + other.requests_stale,
            self.marked + other.marked,
            self.memory_waits + other.memory_waits,
            self.prefetched + other.prefetched,
            self.bytes_before + other.bytes_before,
            self.bytes_after + other.bytes_after,
            max(self.latency_max_ns, other.latency_max_ns),
            [a + b for a, b in zip(self.buckets, other.buckets, strict=True)],
        )

    @property
    def latency_count(self) -> int:
        """Return how many latencies were recorded."""
        return sum(self.buckets)

    def percentile_us(self, share: float) -> float | None:
        """Return the latency in microseconds that `share` (0..1) of the requests stayed within;
        None without any.
        """
        count = self.latency_count
        if not count:
            return None
        wanted = max(1, -int(-share * count // 1))
        seen = 0
        for bucket, n in enumerate(self.buckets):
            seen += n
            if seen >= wanted:
                return min(bucket_limit(bucket), self.latency_max_ns) / 1000
        return self.latency_max_ns / 1000

    @property
    def max_us(self) -> float | None:
        """Return the longest latency in microseconds; None without any."""
        return self.latency_max_ns / 1000 if self.latency_count else None


class StatsBlock:
    """One worker's counters."""

    def __init__(self, memory: SharedMemory) -> None:
        """Own the memory from now on."""
        self.memory = memory
        self._words = memoryview(memory.map).cast("Q")

    @classmethod
    def create(cls, name: str) -> StatsBlock:
        """Make a block of zeros."""
        return cls(SharedMemory.create(f"stats-{name}", BLOCK_SIZE))

    @classmethod
    def attach(cls, fd: int) -> StatsBlock:
        """Map a block that another process made; fd is owned from now on."""
        return cls(SharedMemory.attach(fd))

    def add(self, counter: Counter, n: int) -> None:
        """Count n more."""
        self._words[counter] += n

    def latency(self, ns: int) -> None:
        """Record one latency in nanoseconds."""
        self._words[_NR_COUNTERS + bucket_of(ns)] += 1
        if ns > self._words[Counter.LATENCY_MAX_NS]:
            self._words[Counter.LATENCY_MAX_NS] = ns

    def read(self) -> Totals:
        """Return a copy."""
        words = self._words.tolist()
        return Totals(
            pages=words[Counter.PAGES],
            zero_pages=words[Counter.ZERO_PAGES],
            bytes_sent=words[Counter.BYTES_SENT],
            bytes_received=words[Counter.BYTES_RECEIVED],
            requests=words[Counter.REQUESTS],
            requests_stale=words[Counter.REQUESTS_STALE],
            marked=words[Counter.MARKED],
            memory_waits=words[Counter.MEMORY_WAITS],
            prefetched=words[Counter.PREFETCHED],
            bytes_before=words[Counter.BYTES_BEFORE],
            bytes_after=words[Counter.BYTES_AFTER],
            latency_max_ns=words[Counter.LATENCY_MAX_NS],
            buckets=words[_NR_COUNTERS:],
        )

    def close(self) -> None:
        """Unmap; again is harmless."""
        self._words.release()
        self.memory.close()
