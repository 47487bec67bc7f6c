# SPDX-License-Identifier: GPL-2.0-or-later
"""The figures of the report, as PNG files."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from bench.migration.results import PEER, Results, Sample, Setting, link_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

mpl.use("Agg")

# Okabe and Ito's colours, which colour-blind people can tell apart.
_COLOURS: Final = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C6D1F")
_PEERS_COLOURS: Final = ("#555555", "#999999", "#222222", "#BBBBBB")
_DPI: Final = 110
_LONG_S: Final = 90.0
"""What is drawn of a timeline, at most."""

RATIOS: Final = (
    ("silence_ms", "silence of\nthe guest"),
    ("resident_s", "time to fully\nresident"),
    ("blocked_ms", "vCPUs\nblocked"),
    ("work_lost_s", "work of the\nguest lost"),
    ("total_s", "total time"),
    ("wire_mib", "bytes on\nthe wire"),
)


def colours(names: Sequence[str]) -> dict[str, str]:
    """Return a colour for each contender: greys for QEMU's own."""
    ours, peers = itertools.cycle(_COLOURS), itertools.cycle(_PEERS_COLOURS)
    return {name: next(peers if name.startswith("qemu") else ours) for name in names}


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=_DPI, bbox_inches="tight")
    return path


def _plain(axis: Axis) -> None:
    """Have the numbers at a logarithmic axis read as people write them."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _line(axes: Axes, sample: Sample, colour: str, *, bold: bool) -> None:
    base = sample.baseline_per_s or 1.0
    points = [(t, 100 * speed / base) for t, speed in sample.timeline if t <= _LONG_S]
    if not points:
        return
    axes.plot(
        *zip(*points, strict=True), color=colour, lw=1.4 if bold else 0.7, alpha=1 if bold else 0.35
    )
    if not bold:
        return
    for when, style in ((sample.switch_t_s, "--"), (sample.end_t_s, ":")):
        if when is not None and when <= _LONG_S:
            axes.axvline(when, color=colour, ls=style, lw=1)


def timelines(results: Results, setting: Setting, path: Path) -> Path | None:
    """Draw the guest's speed against its undisturbed one, a row for each contender."""
    colour = colours(results.contenders)
    rows = [
        (
            name,
            [
                one
                for one in results.samples
                if (one.setting, one.contender) == (setting.name, name)
            ],
        )
        for name in results.contenders
    ]
    rows = [(name, samples) for name, samples in rows if any(one.baseline_per_s for one in samples)]
    if not rows:
        return None
    figure = Figure(figsize=(9, 0.9 + 1.05 * len(rows)), layout="constrained")
    all_axes = figure.subplots(len(rows), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, samples) in zip(all_axes, rows, strict=True):
        for number, sample in enumerate(samples):
            _line(axes, sample, colour[name], bold=number == 0)
        axes.set_ylim(0, 130)
        axes.set_yticks([0, 50, 100])
        axes.grid(alpha=0.25)
        axes.set_ylabel("%")
        note = "" if samples[0].ok else f"  ({samples[0].error or 'memory damaged'})"
        axes.set_title(name + note[:90], fontsize=9, loc="left", pad=2)
    all_axes[-1].set_xlabel("seconds since the command    (-- source stops, ·· over)")
    figure.suptitle(f"{setting.name}: work of the guest, % of undisturbed", fontsize=11)
    return _save(figure, path)


def ratios(results: Results, setting: Setting, path: Path) -> Path | None:
    """Draw bars of medians of ratios to QEMU's post-copy, a dot for each round."""
    names = [name for name in results.contenders if name != PEER]
    shown = [
        (what, label)
        for what, label in RATIOS
        if any(results.ratio(setting.name, name, what, PEER) for name in names)
    ]
    if not shown or not names:
        return None
    colour = colours(results.contenders)
    figure = Figure(figsize=(max(7.0, 1.6 * len(shown)), 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        for place, (what, _) in enumerate(shown):
            ratio = results.ratio(setting.name, name, what, PEER)
            if not ratio or ratio <= 0:
                continue
            at = place + (index - (len(names) - 1) / 2) * width
            axes.bar(
                at, ratio, width * 0.92, color=colour[name], label=name if place == 0 else None
            )
            dots = results.ratios(setting.name, name, what, PEER)
            axes.plot([at] * len(dots), dots, ".", color="black", ms=3)
    axes.set_yscale("log")
    _plain(axes.yaxis)
    low, high = axes.get_ylim()
    axes.set_ylim(min(0.4, low), max(2.5, high))
    axes.axhline(1, color="black", lw=1)
    axes.set_xticks(range(len(shown)), [label for _, label in shown])
    axes.set_ylabel(f"times {PEER} (less is better)")
    axes.grid(axis="y", alpha=0.25, which="both")
    handles = [mpl.patches.Patch(color=colour[name], label=name) for name in names]
    axes.legend(
        handles=handles,
        ncols=min(4, len(names)),
        fontsize=8,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        frameon=False,
    )
    figure.suptitle(f"{setting.name}: against {PEER}", fontsize=11)
    return _save(figure, path)


def latencies(results: Results, setting: Setting, path: Path) -> Path | None:
    """Draw what share of the requests was answered within a time, all rounds together."""
    colour = colours(results.contenders)
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    drawn = False
    for name in results.contenders:
        counts: dict[float, int] = {}
        for one in results.of(setting.name, name):
            for bound, number in one.latency_histogram:
                counts[bound] = counts.get(bound, 0) + number
        total = sum(counts.values())
        if not total:
            continue
        bounds = sorted(counts)
        shares = [100 * share / total for share in itertools.accumulate(counts[b] for b in bounds)]
        finite = [(b, s) for b, s in zip(bounds, shares, strict=True) if b != float("inf")]
        axes.step(*zip(*finite, strict=True), where="post", color=colour[name], label=name)
        drawn = True
    if not drawn:
        return None
    limit = results.limits.get(link_name(setting))
    if limit is not None:
        for value, text in ((limit.request_p50_us, "p50"), (limit.request_p99_us, "p99")):
            axes.axvline(
                value,
                color="black",
                ls="--" if text == "p50" else ":",
                lw=1,
                label=f"raw TCP {text}",
            )
    axes.set_xscale("log")
    _plain(axes.xaxis)
    axes.set_ylim(0, 101)
    axes.set_xlabel("microseconds from the request to the mark")
    axes.set_ylabel("% of requests")
    axes.grid(alpha=0.25, which="both")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.suptitle(f"{setting.name}: latency of requested pages", fontsize=11)
    return _save(figure, path)


def costs(results: Results, setting: Setting, path: Path) -> Path | None:
    """Draw the processor time of every process, stacked, for each contender."""
    names = [name for name in results.contenders if results.of(setting.name, name)]
    if not names:
        return None
    processes = sorted(
        {p.name for n in names for one in results.of(setting.name, n) for p in one.processes}
    )
    figure = Figure(figsize=(9, 0.9 + 0.42 * len(names)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(names)
    for process, colour in zip(processes, itertools.cycle(_COLOURS), strict=False):
        means = []
        for name in names:
            samples = results.of(setting.name, name)
            total = sum(p.cpu_s for one in samples for p in one.processes if p.name == process)
            means.append(total / len(samples))
        axes.barh(names, means, left=left, color=colour, label=process)
        left = [a + b for a, b in zip(left, means, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("seconds of processor time, mean of the rounds; QEMU's has the guest's")
    axes.grid(axis="x", alpha=0.25)
    axes.legend(fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return _save(figure, path)


PLOTS: Final = (timelines, ratios, latencies, costs)


def draw(results: Results, folder: Path) -> dict[str, list[Path]]:
    """Write all that there is something to draw for; returns them by setting."""
    folder.mkdir(parents=True, exist_ok=True)
    return {
        setting.name: [
            made
            for plot in PLOTS
            if (made := plot(results, setting, folder / f"{setting.name}-{plot.__name__}.png"))
        ]
        for setting in results.settings
    }
