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
    best: float | None = None
    """The same of the best rounds alone: what is left when nobody disturbs."""

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

    def complete(self, kind: str, key: str) -> list[float]:
        """Return nanoseconds per page ("first_ns") or access ("steady_ns") of each process."""
        return [float(s[kind][key]) for s in self.samples if s["what"] == "complete"]


def middle(values: list[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def ratio(ours: list[float], theirs: list[float]) -> float:
    """Return the median of the ratios of each round: a slow minute hits both sides of it."""
    return middle([a / b for a, b in zip(ours, theirs, strict=True)])


def best_time(ours: list[float], theirs: list[float]) -> float:
    """Return the ratio of the shortest rounds."""
    return min(ours) / min(theirs)


def best_rate(ours: list[float], theirs: list[float]) -> float:
    """Return the ratio of the highest rates."""
    return max(ours) / max(theirs)


def _faults(results: Results) -> list[Wanted]:
    wanted: list[Wanted] = []
    for threads in plan.THREADS:
        ours = results.fault("umem", threads)

        def against(name: str, theirs: list[float], limit: float) -> Wanted:
            what = f"fault, {threads} thread{'s' * (threads > 1)} / {name}"  # noqa: B023
            return Wanted(what, ratio(ours, theirs), limit, best=best_time(ours, theirs))  # noqa: B023

        to_continue = against("CONTINUE", results.fault("continue", threads), 0.8)
        if threads > 1:
            wanted.append(to_continue)
            wanted.append(against("COPY", results.fault("copy", threads), 0.5))
            # The stricter reading: its content need not arrive first.
            wanted.append(against("bare COPY", results.fault("copy-bare", threads), 0.5))
            continue
        # One of the two is enough.
        to_pingpong = against("ping-pong", results.pingpong(), 1.3)
        wanted.append(to_continue if to_continue.met or not to_pingpong.met else to_pingpong)
    return wanted


def _fill(results: Results) -> list[Wanted]:
    return [
        Wanted(
            f"fill, runs of 2 MiB{where} / {name}",
            ratio(ours, results.fill(who, plan.HUGE_KIB)),
            limit,
            False,
            best_rate(ours, results.fill(who, plan.HUGE_KIB)),
        )
        for where, ours in (
            ("", results.fill("umem", plan.HUGE_KIB)),
            (", huge area", results.fill(plan.HUGE_FILLER, plan.HUGE_KIB)),
        )
        for name, who, limit in (
            ("COPY", "copy", 2.0),
            ("bare COPY", "copy-bare", 2.0),
            ("memcpy", "plain", 0.8),
        )
    ]


def _flat(results: Results) -> Wanted:
    rounds = [results.size("umem", mib, "blocks") for mib in plan.SIZES_MIB]
    typical = [middle(values) for values in rounds]
    best = [min(values) for values in rounds]
    # Not against one of them: were that one disturbed, all others would look flat.
    return Wanted(
        "fault, slowest / fastest area size",
        max(typical) / min(typical),
        1.1,
        best=max(best) / min(best),
    )


def _complete(results: Results, name: str, key: str, kind: str) -> Wanted:
    """Return how far a complete area is from a memfd: faster is no less wrong than slower."""

    def off(suffix: str) -> float:
        ours = results.complete(kind, f"{key}_{suffix}")
        return abs(ratio(ours, results.complete("memfd", f"{key}_{suffix}")) - 1)

    return Wanted(f"complete, {name}, {kind}: off memfd", off("ns"), 0.01, best=off("min_ns"))


def wanted(results: Results) -> list[Wanted]:
    """Return every value that is wanted of the driver."""
    return [
        *_faults(results),
        *_fill(results),
        _flat(results),
        *(
            Wanted(f"KiB per GiB, area of {gib} GiB", results.memory(gib, "charged_kib"), 72)
            for gib, _ in plan.MEMORY
        ),
        *(
            _complete(results, name, key, kind)
            for name, key in (("first touch", "first"), ("mapped", "steady"))
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
