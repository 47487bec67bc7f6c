# SPDX-License-Identifier: GPL-2.0-or-later
"""Contenders side by side: ratios to QEMU's post-copy, and what they are ratios of."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from matplotlib.figure import Figure

from bench.migration.plots.drawing import (
    WIDTH_IN,
    beside,
    colours,
    fate,
    height,
    log,
    name_rows,
    number,
    save,
)
from bench.migration.results import PEER, Results, Setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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


def _ratio_panel(
    axes: Axes, results: Results, setting: Setting, what: str, names: Sequence[str]
) -> None:
    colour = colours(results.contenders)
    for row, name in enumerate(names):
        ratio = results.ratio(setting.name, name, what, PEER)
        if ratio is None:
            beside(axes, row, fate(results, setting, name))
            continue
        beside(axes, row, number(ratio))
        if ratio <= 0:
            continue
        # From 1, for a bar that begins nowhere in particular has no length.
        axes.barh(row, ratio - 1, 0.75, left=1, color=colour[name])
        dots = [one for one in results.ratios(setting.name, name, what, PEER) if one > 0]
        axes.plot(dots, [row] * len(dots), "o", ms=3.5, mfc="white", mec="black", mew=0.7, zorder=4)


def ratios(results: Results, setting: Setting, path: Path) -> Path | None:
    """Draw medians of ratios to QEMU's post-copy, a panel for each figure, a dot for each round."""
    names = [name for name in results.players(setting.name) if name != PEER]
    by_figure = {
        what: [one for name in names for one in results.ratios(setting.name, name, what, PEER)]
        for what, _ in RATIOS
    }
    every = [one for values in by_figure.values() for one in values if one > 0]
    if not every:
        return None
    figure = Figure(figsize=(WIDTH_IN, height(len(names), 2)), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True, sharey=True)
    for axes, (what, label) in zip(panels.flat, RATIOS, strict=True):
        name_rows(axes, names)
        log(axes, [1.0, *every])
        axes.axvline(1, color="black", lw=1, zorder=3)
        _ratio_panel(axes, results, setting, what, names)
        axes.set_title(label, fontsize=9, loc="left")
    figure.supxlabel(f"times {PEER}: left of the line is less, and better", fontsize=9)
    what_is_drawn = "bar and number: median of the rounds' ratios, dot: a round"
    figure.suptitle(f"{setting.name}: against {PEER} ({what_is_drawn})", fontsize=10)
    return save(figure, path)


def absolutes(results: Results, setting: Setting, path: Path) -> Path | None:
    """Draw medians of downtime, silence and total time, a dot for each round."""
    names, colour = results.players(setting.name), colours(results.contenders)
    if not any(results.of(setting.name, name) for name in names):
        return None
    figure = Figure(figsize=(WIDTH_IN, height(len(names))), layout="constrained")
    panels = figure.subplots(1, len(ABSOLUTES), sharey=True)
    for axes, (what, label) in zip(panels.flat, ABSOLUTES, strict=True):
        name_rows(axes, names)
        found = {name: results.values(setting.name, name, what) for name in names}
        every = [one for values in found.values() for one in values]
        if every and min(every) > 0 and max(every) / min(every) > _WIDE:
            log(axes, every)
        elif every:
            axes.set_xlim(0, max(every) * 1.08 or 1.0)
        for row, name in enumerate(names):
            values = found[name]
            if not values:
                beside(axes, row, fate(results, setting, name))
                continue
            median = statistics.median(values)
            axes.plot([min(values), max(values)], [row, row], color=colour[name], lw=2)
            # A stroke for the median: a log axis has no zero for a bar to begin at.
            axes.plot([median], [row], "|", ms=13, mew=3.5, color=colour[name])
            axes.plot(
                values, [row] * len(values), "o", ms=4, mfc="white", mec=colour[name], zorder=4
            )
            beside(axes, row, number(median))
        axes.set_xlabel(label, fontsize=9)
    what_is_drawn = "stroke and number: median, dot: a round"
    figure.suptitle(f"{setting.name}: downtime and total time ({what_is_drawn})", fontsize=10)
    return save(figure, path)
