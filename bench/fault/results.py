# SPDX-License-Identifier: GPL-2.0-or-later
"""Samples as they come from the machine, and the figures made of them.  Pure: no I/O."""

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.fault import plan

Sample = dict[str, Any]


@dataclass(frozen=True)
class Wanted:
    """One value that is wanted, and what was measured."""

    what: str
    measured: float
    limit: float
    at_most: bool = True

    @property
    def met(self) -> bool:
        """Return whether it is as wanted."""
        return self.measured <= self.limit if self.at_most else self.measured >= self.limit


@dataclass
class Results:
    """All samples of one boot."""

    samples: list[Sample] = field(default_factory=list)

    def series(self, key: str, what: str, **match: object) -> list[float]:
        """Return a figure of every sample of a kind, in the order of the rounds."""
        return [
            float(sample[key])
            for sample in self.samples
            if sample["what"] == what
            and all(sample.get(name) == value for name, value in match.items())
        ]

    def wrong_pages(self) -> int:
        """Return how many pages had other content than was put there."""
        return sum(int(sample.get("bad", 0)) for sample in self.samples)

    # Microseconds per fault, pages per second.

    def fault(self, who: str, threads: int) -> list[float]:
        """Return the rounds of one contender with so many threads."""
        return self.series(
            "us_per_fault",
            "faults",
            contender=who,
            threads=threads,
            mib=plan.FAULT_MIB,
            spread="all",
        )

    def size(self, who: str, mib: int, spread: str) -> list[float]:
        """Return the rounds of one contender in an area of that size."""
        return self.series("us_per_fault", "faults", contender=who, mib=mib, spread=spread)

    def fill(self, who: str, run_kib: int) -> list[float]:
        """Return the rounds of one filler with runs of that size."""
        return self.series("pages_per_s", "fill", contender=who, run_kib=run_kib)

    def pingpong(self) -> list[float]:
        """Return the rounds of the pipe."""
        return self.series("us_per_round", "pingpong")

    def memory(self, gib: int, key: str) -> float:
        """Return KiB of kernel memory for each GiB in areas of that size."""
        return self.series(key, "memory", gib=gib)[0] / gib

    def complete(self, kind: str, key: str) -> float:
        """Return nanoseconds per page ("first_ns") or per access ("steady_ns")."""
        sample = next(sample for sample in self.samples if sample["what"] == "complete")
        return float(sample[kind][key])


def middle(values: list[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def ratio(ours: list[float], theirs: list[float]) -> float:
    """Return the median of the ratios of each round: a slow minute hits both sides of it."""
    return middle([a / b for a, b in zip(ours, theirs, strict=True)])


def _faults(results: Results) -> list[Wanted]:
    wanted: list[Wanted] = []
    for threads in plan.THREADS:
        ours = results.fault("umem", threads)
        to_continue = ratio(ours, results.fault("continue", threads))
        to_copy = ratio(ours, results.fault("copy", threads))
        if threads > 1:
            wanted.append(Wanted(f"fault, {threads} threads / CONTINUE", to_continue, 0.8))
            wanted.append(Wanted(f"fault, {threads} threads / COPY", to_copy, 0.5))
            continue
        to_pingpong = ratio(ours, results.pingpong())
        # One of the two is enough.
        if to_continue <= 0.8 or to_pingpong > 1.3:
            wanted.append(Wanted("fault, 1 thread / CONTINUE", to_continue, 0.8))
        else:
            wanted.append(Wanted("fault, 1 thread / ping-pong", to_pingpong, 1.3))
    return wanted


def wanted(results: Results) -> list[Wanted]:
    """Return every value that is wanted of the driver."""
    ours = results.fill("umem", 2048)
    smallest = middle(results.size("umem", plan.SIZES_MIB[0], "blocks"))
    flat = [
        abs(middle(results.size("umem", mib, "blocks")) / smallest - 1)
        for mib in plan.SIZES_MIB[1:]
    ]

    def complete(kind: str, key: str) -> float:
        return results.complete(kind, key) / results.complete("memfd", key)

    return [
        *_faults(results),
        Wanted("fill, runs of 2 MiB / COPY", ratio(ours, results.fill("copy", 2048)), 2.0, False),
        Wanted(
            "fill, runs of 2 MiB / memcpy", ratio(ours, results.fill("plain", 2048)), 0.8, False
        ),
        Wanted("fault, area size: largest deviation", max(flat), 0.1),
        *(
            Wanted(f"KiB per GiB, area of {gib} GiB", results.memory(gib, "charged_kib"), 72)
            for gib, _ in plan.MEMORY
        ),
        *(
            Wanted(f"complete, {name}, {kind} / memfd", complete(kind, key), 1.01)
            for name, key in (("first touch", "first_ns"), ("mapped", "steady_ns"))
            for kind in ("before", "after")
        ),
    ]


def as_json(results: Results, environment: dict[str, object]) -> dict[str, object]:
    """Return what is kept of a run."""
    return {
        "environment": environment,
        "wanted": [{**asdict(one), "met": one.met} for one in wanted(results)],
        "samples": results.samples,
    }
