# SPDX-License-Identifier: GPL-2.0-or-later
"""Histograms of pyumem.stats as they are told: by powers of two, 16 buckets of a block to one."""

from __future__ import annotations

from itertools import pairwise
from typing import Final

from pyumem.stats import Totals, bucket_limit, bucket_of

POWERS: Final = range(14, 35)
"""Of nanoseconds: 16 us, below the fastest network, to 17 s."""
LIMITS_NS: Final = tuple(bucket_limit(bucket_of(1 << power) - 1) for power in POWERS)
"""The longest latency that each bucket but the last counts; the last has no limit."""
_BOUNDS: Final = (0, *(bucket_of(1 << power) for power in POWERS), None)


def counts(totals: Totals) -> list[int]:
    """Return how many latencies fell between the LIMITS_NS, one more than there are limits."""
    return [sum(totals.buckets[start:end]) for start, end in pairwise(_BOUNDS)]


def to_json(totals: Totals) -> list[dict[str, float | int | None]]:
    """Return the histogram from its first bucket that is not empty to its last: the longest latency
    of each, in microseconds, None for one without a limit, and how many it counts.
    """
    told = list(zip((*LIMITS_NS, None), counts(totals), strict=True))
    while told and not told[-1][1]:
        told.pop()
    while told and not told[0][1]:
        del told[0]
    return [{"up_to_us": ns / 1000 if ns else None, "requests": n} for ns, n in told]


def sum_s(totals: Totals) -> float:
    """Return the sum of all latencies in seconds, within 1/32: each is taken for the middle of its
    bucket.
    """
    middles = (
        n * (bucket_limit(bucket) + (bucket_limit(bucket - 1) + 1 if bucket else 0)) / 2
        for bucket, n in enumerate(totals.buckets)
        if n
    )
    return sum(middles) / 1e9
