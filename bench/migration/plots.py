# SPDX-License-Identifier: GPL-2.0-or-later
"""The figures of the report, as PNG files.

A contender has one colour in all of them, in every run, and its name beside what is drawn of it.
What there is no figure for is said, not left out: an empty row looks like a zero.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from bench.migration.plan import CONTENDERS
from bench.migration.results import PEER, Results, Sample, Setting, link_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

mpl.use("Agg")

# Okabe and Ito's colours, which colour-blind people can tell apart; QEMU's own are greys.
_COLOURS: Final = ("#56B4E9", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#8C6D1F")
_PEERS_COLOURS: Final = ("#1A1A1A", "#7A7A7A", "#4A4A4A", "#ABABAB")
# Paul Tol's light ones: no contender's.
_PROCESS_COLOURS: Final = ("#77AADD", "#EEDD88", "#EE8866", "#99DDFF", "#FFAABB", "#BBCC33")
_PROCESSES: Final = ("source qemu", "destination qemu", "umemctl migrate", "umemctl serve")

_DPI: Final = 110
_WIDTH_IN: Final = 9.0
"""So that a figure fits the page of the report as it is, at 100 %."""
_ROW_IN: Final = 0.25
"""Of a contender where a row is a bar."""
_SMALL: Final = 8
"""Points."""
_AFTER_S: Final = 2.0
"""Seconds of a timeline that are drawn after the end."""
_WIDE: Final = 20.0
"""Largest by smallest value from which on an axis is logarithmic."""

RATIOS: Final = (
    ("silence_ms", "silence of the guest"),
    ("resident_s", "time to fully resident"),
    ("blocked_ms", "vCPUs blocked"),
    ("work_lost_s", "work of the guest lost"),
    ("total_s", "total time"),
    ("wire_mib", "bytes on the wire"),
)
ABSOLUTES: Final = (
    ("downtime_ms", "STOP to RESUME, ms"),
    ("silence_ms", "silence of the guest, ms"),
    ("total_s", "total time, s"),
)


def colours(names: Sequence[str]) -> dict[str, str]:
    """Return a colour for each contender: the plan's have theirs, whoever else runs."""
    ours, peers = itertools.cycle(_COLOURS), itertools.cycle(_PEERS_COLOURS)
    every = dict.fromkeys([*(one.name for one in CONTENDERS), *names])
    found = {name: next(peers if name.startswith("qemu") else ours) for name in every}
    return {name: found[name] for name in names}


# --- what the figures share ---


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=_DPI)
    return path


def _tick(value: float, _: object = None) -> str:
    return f"{value:g}"


def _number(value: float) -> str:
    """Return two digits, or all before the point: 0.056, 0.50, 5.0, 56, 560, 5600."""
    return f"{value:#.2g}" if 0 < abs(value) < 9.95 else f"{value:.0f}"


def _log(axes: Axes, values: Iterable[float], most: float = 50.0) -> None:
    """Make the x axis logarithmic, with room around the values and numbers that people read.

    Beyond a range of so many times there is room for powers of ten alone.
    """
    axes.set_xscale("log")
    known = [value for value in values if value > 0]
    low, high = min(known), max(known)
    # An octave at least, so that there are two ticks.
    middle = math.sqrt(low * high)
    low, high = min(low / 1.2, middle / 1.6), max(high * 1.2, middle * 1.6)
    axes.set_xlim(low, high)
    subs = (1, 2, 5) if high / low < most else (1,)
    axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axes.xaxis.set_major_formatter(FuncFormatter(_tick))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(labelsize=_SMALL)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _beside(axes: Axes, row: int, text: str) -> None:
    """Write a value to the right of the axes, where it covers nothing."""
    where = axes.get_yaxis_transform()
    axes.text(1.02, row, text, transform=where, fontsize=_SMALL, va="center", clip_on=False)


def _fate(results: Results, setting: Setting, name: str) -> str:
    """Say why a contender has no figure."""
    ran = [one for one in results.samples if (one.setting, one.contender) == (setting.name, name)]
    if not ran:
        return "not run"
    if any(one.ok for one in ran):
        return "-"
    return "not over" if all(one.error.startswith("not over") for one in ran) else "failed"


def _height(rows: int, panels: int = 1) -> float:
    return 0.75 + panels * (0.65 + _ROW_IN * rows)


# --- the guest's speed ---


def _middle(samples: Sequence[Sample]) -> Sample:
    """Return the round whose total time is the median, or any that did not end."""
    ended = sorted((one for one in samples if one.ok), key=lambda one: one.total_s or 0.0)
    return ended[(len(ended) - 1) // 2] if ended else samples[0]


def _last_s(rows: Iterable[Sequence[Sample]]) -> float:
    """Return where the timelines are cut, in seconds.

    One that is never over would press all others into the first centimetre.
    """
    samples = [one for row in rows for one in row if one.end_t_s is not None]
    ended = [one.end_t_s or 0.0 for one in samples if one.ok]
    if not ended:
        return max((one.end_t_s or 0.0 for one in samples), default=10.0) + _AFTER_S
    return min(max(ended), 3 * statistics.median(ended)) + _AFTER_S


def _line(axes: Axes, sample: Sample, colour: str, *, bold: bool) -> None:
    base = sample.baseline_per_s or 1.0
    points = [(t, 100 * speed / base) for t, speed in sample.timeline]
    if not points:
        return
    # A point tells of the time since the one before; nothing is known between the two.
    axes.plot(
        *zip(*points, strict=True),
        color=colour,
        drawstyle="steps-pre",
        lw=1.5 if bold else 0.7,
        alpha=1 if bold else 0.4,
        zorder=3 if bold else 2,
    )


def _marks(axes: Axes, sample: Sample) -> None:
    for when, style in ((sample.switch_t_s, "--"), (sample.end_t_s, ":")):
        if when is not None:
            axes.axvline(when, color="black", ls=style, lw=1, zorder=1)


def _told(sample: Sample, last_s: float) -> str:
    if sample.error:
        return sample.error
    if not sample.ok:
        return "the guest's memory is damaged"
    words = [] if sample.total_s is None else [f"over after {_number(sample.total_s)} s"]
    if (sample.end_t_s or 0.0) > last_s:
        words[-1:] = [" ".join([*words[-1:], "(beyond the right edge)"])]
    if sample.silence_ms is not None:
        words.append(f"silent for {_number(sample.silence_ms)} ms")
    return ", ".join(words)


def _shorter(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


def timelines(results: Results, setting: Setting, path: Path) -> Path | None:
    """Draw the guest's speed against its undisturbed one, a row for each contender."""
    colour = colours(results.contenders)
    found: dict[str, list[Sample]] = {name: [] for name in results.contenders}
    for one in results.samples:
        if one.setting == setting.name and one.baseline_per_s and one.timeline:
            found.setdefault(one.contender, []).append(one)
    rows = [(name, samples) for name, samples in found.items() if samples]
    if not rows:
        return None
    last_s = _last_s(samples for _, samples in rows)
    figure = Figure(figsize=(_WIDTH_IN, 1.1 + 0.95 * len(rows)), layout="constrained")
    all_axes = figure.subplots(len(rows), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, samples) in zip(all_axes, rows, strict=True):
        chosen = _middle(samples)
        for sample in samples:
            _line(axes, sample, colour[name], bold=sample is chosen)
        _marks(axes, chosen)
        axes.set_xlim(-1.0, last_s)
        axes.set_ylim(0, 125)
        axes.set_yticks([0, 50, 100])
        axes.tick_params(labelsize=_SMALL)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(name, fontsize=9, loc="left", pad=3, fontweight="bold")
        note = _shorter(_told(chosen, last_s), 80)
        axes.set_title(note, fontsize=_SMALL, loc="right", pad=3, parse_math=False)
    without = [name for name in results.contenders if name not in dict(rows)]
    told = [f"{name} ({_fate(results, setting, name)})" for name in without]
    note = f"\nnone of: {', '.join(told)}" if told else ""
    all_axes[-1].set_xlabel(f"seconds since the command{note}", fontsize=9, parse_math=False)
    figure.supylabel("work of the guest, % of undisturbed", fontsize=9)
    rounds = "bold: the round of median total time, faint: the others"
    figure.suptitle(f"{setting.name}: work of the guest ({rounds})", fontsize=10)
    handles = [
        Line2D([], [], color="black", ls=style, lw=1, label=text)
        for style, text in (("--", "the source stops"), (":", "over, or given up"))
    ]
    figure.legend(
        handles=handles, fontsize=_SMALL, ncols=2, loc="outside lower center", frameon=False
    )
    return _save(figure, path)


# --- against QEMU's post-copy ---


def _ratio_panel(
    axes: Axes, results: Results, setting: Setting, what: str, names: Sequence[str]
) -> None:
    colour = colours(results.contenders)
    for row, name in enumerate(names):
        ratio = results.ratio(setting.name, name, what, PEER)
        if ratio is None:
            _beside(axes, row, _fate(results, setting, name))
            continue
        _beside(axes, row, _number(ratio))
        if ratio <= 0:
            continue
        # From 1, for a bar that begins nowhere in particular has no length.
        axes.barh(row, ratio - 1, 0.75, left=1, color=colour[name])
        dots = [one for one in results.ratios(setting.name, name, what, PEER) if one > 0]
        axes.plot(dots, [row] * len(dots), "o", ms=3.5, mfc="white", mec="black", mew=0.7, zorder=4)


def ratios(results: Results, setting: Setting, path: Path) -> Path | None:
    """Draw medians of ratios to QEMU's post-copy, a panel for each figure, a dot for each round."""
    names = [name for name in results.contenders if name != PEER]
    by_figure = {
        what: [one for name in names for one in results.ratios(setting.name, name, what, PEER)]
        for what, _ in RATIOS
    }
    every = [one for values in by_figure.values() for one in values if one > 0]
    if not every:
        return None
    figure = Figure(figsize=(_WIDTH_IN, _height(len(names), 2)), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True, sharey=True)
    for axes, (what, label) in zip(panels.flat, RATIOS, strict=True):
        _name_rows(axes, names)
        _log(axes, [1.0, *every])
        axes.axvline(1, color="black", lw=1, zorder=3)
        _ratio_panel(axes, results, setting, what, names)
        axes.set_title(label, fontsize=9, loc="left")
    figure.supxlabel(f"times {PEER}: left of the line is less, and better", fontsize=9)
    what_is_drawn = "bar and number: median of the rounds' ratios, dot: a round"
    figure.suptitle(f"{setting.name}: against {PEER} ({what_is_drawn})", fontsize=10)
    return _save(figure, path)


# --- without QEMU's post-copy ---


def absolutes(results: Results, setting: Setting, path: Path) -> Path | None:
    """Draw medians of downtime, silence and total time, a dot for each round."""
    names, colour = results.contenders, colours(results.contenders)
    if not any(results.of(setting.name, name) for name in names):
        return None
    figure = Figure(figsize=(_WIDTH_IN, _height(len(names))), layout="constrained")
    panels = figure.subplots(1, len(ABSOLUTES), sharey=True)
    for axes, (what, label) in zip(panels.flat, ABSOLUTES, strict=True):
        _name_rows(axes, names)
        found = {name: results.values(setting.name, name, what) for name in names}
        every = [one for values in found.values() for one in values]
        if every and min(every) > 0 and max(every) / min(every) > _WIDE:
            _log(axes, every)
        elif every:
            axes.set_xlim(0, max(every) * 1.08 or 1.0)
        for row, name in enumerate(names):
            values = found[name]
            if not values:
                _beside(axes, row, _fate(results, setting, name))
                continue
            median = statistics.median(values)
            axes.plot([min(values), max(values)], [row, row], color=colour[name], lw=2)
            # A stroke for the median: a log axis has no zero for a bar to begin at.
            axes.plot([median], [row], "|", ms=13, mew=3.5, color=colour[name])
            axes.plot(
                values, [row] * len(values), "o", ms=4, mfc="white", mec=colour[name], zorder=4
            )
            _beside(axes, row, _number(median))
        axes.set_xlabel(label, fontsize=9)
    what_is_drawn = "stroke and number: median, dot: a round"
    figure.suptitle(f"{setting.name}: downtime and total time ({what_is_drawn})", fontsize=10)
    return _save(figure, path)


# --- pages over the link ---


def _shares(samples: Sequence[Sample]) -> list[tuple[float, float]]:
    """Return (us, % of requests answered by then), all rounds together."""
    counts: dict[float, int] = {}
    for one in samples:
        for bound, number in one.latency_histogram:
            counts[bound] = counts.get(bound, 0) + number
    total = sum(counts.values())
    if not total:
        return []
    bounds = sorted(counts)
    sums = itertools.accumulate(counts[bound] for bound in bounds)
    pairs = zip(bounds, sums, strict=True)
    return [(bound, 100 * number / total) for bound, number in pairs if math.isfinite(bound)]


def latencies(results: Results, setting: Setting, path: Path) -> Path | None:
    """Draw what share of the requests was answered within a time, all rounds together."""
    colour = colours(results.contenders)
    found = {name: _shares(results.of(setting.name, name)) for name in results.contenders}
    found = {name: points for name, points in found.items() if points}
    if not found:
        return None
    figure = Figure(figsize=(_WIDTH_IN, 3.6), layout="constrained")
    axes = figure.subplots()
    limit = results.limits.get(link_name(setting))
    told = [] if limit is None else [limit.request_p50_us, limit.request_p99_us]
    for value, style, text in zip(told, ("--", ":"), ("p50", "p99"), strict=False):
        label = f"raw TCP {text}: {_number(value)} us"
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
    _log(axes, [*known, max(ends), *told], most=2000)
    axes.set_ylim(0, 102)
    axes.tick_params(labelsize=_SMALL)
    axes.set_xlabel("microseconds from the request until the page is marked", fontsize=9)
    axes.set_ylabel("% of requests answered", fontsize=9)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=_SMALL, loc="outside right center", frameon=False)
    figure.suptitle(f"{setting.name}: latency of requested pages, all rounds", fontsize=10)
    return _save(figure, path)


def streams(results: Results, setting: Setting, path: Path) -> Path | None:
    """Draw the background's speed beside that of a raw TCP stream over the same link."""
    colour = colours(results.contenders)
    found = {
        name: results.values(setting.name, name, "background_mib_s") for name in results.contenders
    }
    found = {name: values for name, values in found.items() if values}
    if not found:
        return None
    figure = Figure(figsize=(_WIDTH_IN, _height(len(found)) + 0.3), layout="constrained")
    axes = figure.subplots()
    _name_rows(axes, list(found))
    limit = results.limits.get(link_name(setting))
    if limit is not None:
        raw = limit.stream_mib_s
        for share, style in ((1.0, "-"), (0.8, "--")):
            text = f"raw TCP stream: {_number(raw)} MiB/s" if share == 1 else "80 % of it: wanted"
            axes.axvline(share * raw, color="black", ls=style, lw=1.3, label=text)
    for row, (name, values) in enumerate(found.items()):
        axes.barh(row, statistics.median(values), 0.7, color=colour[name])
        axes.plot(
            values, [row] * len(values), "o", ms=3.5, mfc="white", mec="black", mew=0.7, zorder=4
        )
        _beside(axes, row, _number(statistics.median(values)))
    axes.set_xlim(left=0)
    axes.set_xlabel("MiB of pages per second, from the switch until resident", fontsize=9)
    if limit is not None:
        figure.legend(fontsize=_SMALL, ncols=2, loc="outside lower center", frameon=False)
    what_is_drawn = "bar and number: median, dot: a round"
    figure.suptitle(f"{setting.name}: background transfer ({what_is_drawn})", fontsize=10)
    return _save(figure, path)


# --- what it costs ---


def _mean(samples: Sequence[Sample], process: str, what: str) -> float:
    """Return the mean of a figure of a process: of medians a stack would be no sum."""
    values = [getattr(p, what) for one in samples for p in one.processes if p.name == process]
    return sum(values) / len(samples) if samples else 0.0


def _stack(
    axes: Axes, results: Results, setting: Setting, processes: dict[str, str], what: str
) -> None:
    _name_rows(axes, results.contenders)
    for row, name in enumerate(results.contenders):
        samples, left = results.of(setting.name, name), 0.0
        if not samples:
            _beside(axes, row, _fate(results, setting, name))
            continue
        for process, colour in processes.items():
            value = _mean(samples, process, what)
            axes.barh(row, value, 0.75, left=left, color=colour, edgecolor="white", lw=0.6)
            left += value
        _beside(axes, row, _number(left) if left else "-")
    axes.set_xlim(left=0)


def costs(results: Results, setting: Setting, path: Path) -> Path | None:
    """Draw processor time and the daemons' memory, stacked by process, for each contender."""
    names = results.contenders
    seen = {
        p.name for name in names for one in results.of(setting.name, name) for p in one.processes
    }
    if not seen:
        return None
    # Those that are known always have the same colour, as contenders do.
    every = [*_PROCESSES, *sorted(seen - set(_PROCESSES))]
    colour = dict(zip(every, itertools.cycle(_PROCESS_COLOURS), strict=False))
    shown = {name: colour[name] for name in every if name in seen}
    figure = Figure(figsize=(_WIDTH_IN, _height(len(names)) + 0.3), layout="constrained")
    cpu, memory = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    _stack(cpu, results, setting, shown, "cpu_s")
    cpu.set_xlabel("seconds of processor time; QEMU's has the guest's", fontsize=9)
    # QEMU's private memory may be all of the guest's.
    daemons = {name: one for name, one in shown.items() if "qemu" not in name}
    _stack(memory, results, setting, daemons, "peak_mib")
    memory.set_xlabel("peak private memory of umem's, MiB", fontsize=9)
    figure.legend(
        handles=[Patch(color=one, label=name) for name, one in shown.items()],
        fontsize=_SMALL,
        ncols=4,
        loc="outside lower center",
        frameon=False,
    )
    figure.suptitle(f"{setting.name}: what it costs, mean of the rounds", fontsize=10)
    return _save(figure, path)


PLOTS: Final = (timelines, ratios, absolutes, latencies, streams, costs)


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
