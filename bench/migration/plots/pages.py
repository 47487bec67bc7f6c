# SPDX-License-Identifier: GPL-2.0-or-later
"""Pages over the link: latencies of requests, and the background's speed, beside its limits."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from bench.migration.plots.drawing import (
    SMALL,
    WIDTH_IN,
    beside,
    colours,
    height,
    log,
    name_rows,
    number,
    save,
)
from bench.migration.results import Results, Sample, Setting, link_name

if TYPE_CHECKING:
    pass


def _shares(samples: Sequence[Sample]) -> list[tuple[float, float]]:
    """Return (us, % of requests answered by then), all rounds together."""
    counts: dict[float, int] = {}
    for one in samples:
        for bound, requests in one.latency_histogram:
            counts[bound] = counts.get(bound, 0) + requests
    total = sum(counts.values())
    if not total:
        return []
    bounds = sorted(counts)
    sums = itertools.accumulate(counts[bound] for bound in bounds)
    pairs = zip(bounds, sums, strict=True)
    return [(bound, 100 * answered / total) for bound, answered in pairs if math.isfinite(bound)]


def latencies(results: Results, setting: Setting, path: Path) -> Path | None:
    """Draw what share of the requests was answered within a time, all rounds together."""
    colour = colours(results.contenders)
    found = {
        name: _shares(results.of(setting.name, name)) for name in results.players(setting.name)
    }
    found = {name: points for name, points in found.items() if points}
    if not found:
        return None
    figure = Figure(figsize=(WIDTH_IN, 3.6), layout="constrained")
    axes = figure.subplots()
    limit = results.limits.get(link_name(setting))
    told = [] if limit is None else [limit.request_p50_us, limit.request_p99_us]
    for value, style, text in zip(told, ("--", ":"), ("p50", "p99"), strict=False):
        label = f"raw TCP {text}: {number(value)} us"
        axes.axvline(value, color="black", ls=style, lw=1.3, label=label)
    # Of a bucket only the bound is known: a mark there, and a line to lead the eye.
    for marker, (name, points) in zip(itertools.cycle("osD^vP"), found.items(), strict=False):
        axes.plot(
            *zip(*points, strict=True), marker=marker, ms=4, lw=1.5, color=colour[name], label=name
        )
    # What comes before the first request, or after the last, is only an empty page.
    known = [us for points in found.values() for us, share in points if 0.1 < share < 99.9]
    ends = [
        next((us for us, share in points if share >= 99.9), points[-1][0])
        for points in found.values()
    ]
    log(axes, [*known, max(ends), *told], most=2000)
    axes.set_ylim(0, 102)
    axes.tick_params(labelsize=SMALL)
    axes.set_xlabel("microseconds from the request until the page is marked", fontsize=9)
    axes.set_ylabel("% of requests answered", fontsize=9)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=SMALL, loc="outside right center", frameon=False)
    figure.suptitle(f"{setting.name}: latency of requested pages, all rounds", fontsize=10)
    return save(figure, path)


def streams(results: Results, setting: Setting, path: Path) -> Path | None:
    """Draw the background's speed beside that of a raw TCP stream over the same link."""
    colour = colours(results.contenders)
    found = {
        name: results.values(setting.name, name, "background_mib_s")
        for name in results.players(setting.name)
    }
    found = {name: values for name, values in found.items() if values}
    if not found:
        return None
    figure = Figure(figsize=(WIDTH_IN, height(len(found)) + 0.3), layout="constrained")
    axes = figure.subplots()
    name_rows(axes, list(found))
    limit = results.limits.get(link_name(setting))
    if limit is not None:
        raw = limit.stream_mib_s
        for share, style in ((1.0, "-"), (0.8, "--")):
            text = f"raw TCP stream: {number(raw)} MiB/s" if share == 1 else "80 % of it: wanted"
            axes.axvline(share * raw, color="black", ls=style, lw=1.3, label=text)
    for row, (name, values) in enumerate(found.items()):
        axes.barh(row, statistics.median(values), 0.7, color=colour[name])
        axes.plot(
            values, [row] * len(values), "o", ms=3.5, mfc="white", mec="black", mew=0.7, zorder=4
        )
        beside(axes, row, number(statistics.median(values)))
    axes.set_xlim(left=0)
    axes.set_xlabel("MiB of pages per second, from the switch until resident", fontsize=9)
    if limit is not None:
        figure.legend(fontsize=SMALL, ncols=2, loc="outside lower center", frameon=False)
    what_is_drawn = "bar and number: median, dot: a round"
    figure.suptitle(f"{setting.name}: background transfer ({what_is_drawn})", fontsize=10)
    return save(figure, path)
