# SPDX-License-Identifier: GPL-2.0-or-later
"""What one run of the bench found, and its form as JSON.  Pure: no I/O.

Times named t_s count from the moment at which the migration was asked for.  A value that a
contender cannot tell (QEMU 10.0 has no latency of requests, pre-copy no demand faults) is None.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

FORMAT = 1
"""Of the JSON file."""


@dataclass(frozen=True)
class Setting:
    """What all contenders meet alike."""

    name: str
    """Short, unique in a run: `random-1g`."""
    workload: str
    """idle, read, random, sequential, compute or redis: see bench/migration/guest/load.c."""
    vcpus: int = 1
    memory_mib: int = 256
    working_set_mib: int = 128
    async_pf: bool = True
    """KVM's asynchronous page faults."""
    accel: str = "kvm"
    """What runs the guest: kvm or tcg.  In an emulated machine KVM runs on emulated SVM."""
    rate: str | None = "1gbit"
    """Of the link, as tc takes it; None: not shaped."""
    delay: str | None = "0.2ms"
    """One way."""


@dataclass(frozen=True)
class Limit:
    """What the same link gives a C program that does nothing else: medians of its rounds."""

    request_p50_us: float
    """A request of 16 bytes answered by 4 KiB, over TCP, one at a time."""
    request_p99_us: float
    stream_mib_s: float
    """One TCP stream."""


@dataclass(frozen=True)
class Process:
    """One process, or the workers of one, over the whole migration."""

    name: str
    """`source qemu`, `destination qemu`, `umemctl migrate`, `umemctl serve`."""
    cpu_s: float
    """User and system time, its children's too."""
    peak_mib: float
    """Largest anonymous memory.  Of a QEMU whose RAM is no file, the guest's is in it."""


@dataclass(frozen=True)
class Sample:
    """One migration."""

    setting: str
    contender: str
    round: int
    error: str = ""
    """Why it did not come to its end; empty: it did.  Then what was measured until there."""
    downtime_ms: float | None = None
    """From QEMU's STOP at the source to its RESUME at the destination."""
    downtime_parts_ms: dict[str, float] = field(default_factory=dict)
    """umem's: what its report says that the downtime was made of."""
    silence_ms: float | None = None
    """Longest time without a beat of the guest around the switch, less the beat itself: what
    somebody who looks at the guest feels."""
    total_s: float | None = None
    """From the command to its end."""
    resident_s: float | None = None
    """From the source's stop until every page was at the destination; 0 for pre-copy."""
    source_free_s: float | None = None
    """From the command until the source's processors were free."""
    blocked_ms: float | None = None
    """Of all vCPUs together, waiting for pages."""
    baseline_per_s: float | None = None
    """Work of the guest before, undisturbed."""
    work_lost_s: float | None = None
    """Seconds of undisturbed work that were not done, from the command until 2 s after its end."""
    compute_share: float | None = None
    """Speed of the threads that fault nothing beside one that does, from the switch until
    resident, against before.  Workload compute alone."""
    wire_mib: float | None = None
    """Both directions of the link, headers and all."""
    demand_p50_us: float | None = None
    demand_p99_us: float | None = None
    demand_pages: int | None = None
    background_mib_s: float | None = None
    """MiB of pages, per second, from the switch until resident, all but what was asked for."""
    verdict_ok: bool | None = None
    """What the guest says of its memory at the end."""
    processes: list[Process] = field(default_factory=list)
    timeline: list[tuple[float, float]] = field(default_factory=list)
    """(t_s, work per s since the point before), in steps of 100 ms of the guest's clock."""
    switch_t_s: float | None = None
    """When the source's vCPUs stopped."""
    end_t_s: float | None = None
    """When it was over."""
    latency_histogram: list[tuple[float, int]] = field(default_factory=list)
    """(upper bound in us, requests)."""

    @property
    def ok(self) -> bool:
        """Tell whether it came to its end with the guest's memory sound."""
        return not self.error and self.verdict_ok is not False


@dataclass
class Results:
    """One run."""

    command: str
    """That makes it again."""
    environment: dict[str, Any]
    settings: list[Setting]
    contenders: list[str]
    """In the order of the plan."""
    limits: dict[str, Limit] = field(default_factory=dict)
    """By link: `1gbit 0.2ms`, `none none`."""
    samples: list[Sample] = field(default_factory=list)
    plan: dict[str, list[str]] = field(default_factory=dict)
    """By setting: who was to meet it, where that is not all of them."""

    def players(self, setting: str) -> list[str]:
        """Return the contenders that were to meet a setting, whatever came of it."""
        return self.plan.get(setting, self.contenders)

    def of(self, setting: str, contender: str) -> list[Sample]:
        """Return the rounds of one contender that came to their end."""
        return [
            one
            for one in self.samples
            if one.setting == setting and one.contender == contender and one.ok
        ]

    def values(self, setting: str, contender: str, what: str) -> list[float]:
        """Return a figure of each of its rounds."""
        found = (getattr(one, what) for one in self.of(setting, contender))
        return [float(value) for value in found if value is not None]

    def median(self, setting: str, contender: str, what: str) -> float | None:
        """Return the median of a figure, None without any."""
        values = self.values(setting, contender, what)
        return statistics.median(values) if values else None

    def ratios(self, setting: str, contender: str, what: str, to: str) -> list[float]:
        """Return the rounds' ratios of a figure to another contender's of the same round.

        There is none to nothing, nor to less: work lost is a difference, and may be either.
        """
        mine = {one.round: getattr(one, what) for one in self.of(setting, contender)}
        others = {one.round: getattr(one, what) for one in self.of(setting, to)}
        return [
            mine[number] / others[number]
            for number in sorted(mine.keys() & others.keys())
            if mine[number] is not None and others[number] is not None and others[number] > 0
        ]

    def ratio(self, setting: str, contender: str, what: str, to: str) -> float | None:
        """Return the median of ratios(), None without any."""
        found = self.ratios(setting, contender, what, to)
        return statistics.median(found) if found else None

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        told = {"format": FORMAT, **asdict(self)}
        for one in told["samples"]:
            # JSON has no infinity: what has no bound has null.
            one["latency_histogram"] = [
                (bound if math.isfinite(bound) else None, requests)
                for bound, requests in one["latency_histogram"]
            ]
        return told

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> Results:
        """Read what to_json() made.  Raises ValueError, KeyError, TypeError."""
        if told.get("format") != FORMAT:
            raise ValueError(f"results of format {told.get('format')}, not {FORMAT}")
        samples = []
        for one in told["samples"]:
            one = dict(one)
            one["processes"] = [Process(**process) for process in one["processes"]]
            one["timeline"] = [tuple(point) for point in one["timeline"]]
            one["latency_histogram"] = [
                (math.inf if bound is None else bound, requests)
                for bound, requests in one["latency_histogram"]
            ]
            samples.append(Sample(**one))
        return cls(
            told["command"],
            told["environment"],
            [Setting(**one) for one in told["settings"]],
            list(told["contenders"]),
            {name: Limit(**one) for name, one in told["limits"].items()},
            samples,
            {setting: list(names) for setting, names in told.get("plan", {}).items()},
        )


def link_name(setting: Setting) -> str:
    """Return the key of the setting's link in Results.limits."""
    return f"{setting.rate or 'none'} {setting.delay or 'none'}"


# --- what is wanted ---

PEER = "qemu-postcopy"
OURS = "umem-postcopy"


@dataclass(frozen=True)
class Wanted:
    """A goal: the median of a ratio, in one setting."""

    what: str
    setting: str
    measured: float
    limit: float
    at_most: bool = True

    @property
    def met(self) -> bool:
        """Tell whether it is as wanted."""
        return self.measured <= self.limit if self.at_most else self.measured >= self.limit


_TO_PEER: tuple[tuple[str, str, float], ...] = (
    ("downtime", "downtime_ms", 1.0),
    ("silence of the guest", "silence_ms", 1.0),
    ("time to fully resident", "resident_s", 0.6),
    ("vCPU blocked time", "blocked_ms", 0.5),
    ("guest work lost", "work_lost_s", 0.7),
)


def wanted(results: Results) -> list[Wanted]:
    """Hold the run against the goals of the project, setting by setting."""
    return [one for one in _goals(results) if math.isfinite(one.measured)]


def unmeasured(results: Results) -> list[Wanted]:
    """Return the goals that the run was to measure and has no figure for: none is met.

    A contender whose every migration failed would have no goal to miss otherwise.
    """
    return [one for one in _goals(results) if not math.isfinite(one.measured)]


def _goals(results: Results) -> list[Wanted]:
    """Return all that are asked of this run, with NaN where there is no figure."""
    found: list[Wanted] = []
    if OURS not in results.contenders:
        return found

    def add(
        what: str, setting: str, measured: float | None, limit: float, *, at_most: bool = True
    ) -> None:
        figure = math.nan if measured is None else measured
        found.append(Wanted(what, setting, figure, limit, at_most))

    def over(top: float | None, bottom: float | None) -> float | None:
        return top / bottom if top is not None and bottom else None

    for setting in results.settings:
        name = setting.name
        if OURS not in results.players(name):
            continue
        for what, value, limit in _TO_PEER if PEER in results.contenders else ():
            if value == "work_lost_s" and setting.workload == "idle":
                continue
            add(f"{what} / {PEER}", name, results.ratio(name, OURS, value, PEER), limit)
        link = results.limits.get(link_name(setting))
        p50, p99, stream, share = (
            results.median(name, OURS, what)
            for what in ("demand_p50_us", "demand_p99_us", "background_mib_s", "compute_share")
        )
        request_p50, request_p99, raw_stream = (
            (link.request_p50_us, link.request_p99_us, link.stream_mib_s)
            if link is not None
            else (None, None, None)
        )
        add("demand latency p50 / raw TCP", name, over(p50, request_p50), 2.0)
        add("demand latency p99 / raw TCP", name, over(p99, request_p99), 4.0)
        rate = over(stream, raw_stream)
        add("background stream / raw TCP stream", name, rate, 0.8, at_most=False)
        if setting.workload == "compute":
            add("speed of vCPUs that fault nothing", name, share, 0.95, at_most=False)
    return found
