# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's speed, before, during and after."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bench.migration.plots.drawing import SMALL, WIDTH_IN, colours, fate, number, save
from bench.migration.results import Results, Sample, Setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_AFTER_S: Final = 2.0
"""Seconds of a timeline that are drawn after the end."""


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
    words = [] if sample.total_s is None else [f"over after {number(sample.total_s)} s"]
    if (sample.end_t_s or 0.0) > last_s:
        words[-1:] = [" ".join([*words[-1:], "(beyond the right edge)"])]
    if sample.silence_ms is not None:
        words.append(f"silent for {number(sample.silence_ms)} ms")
    return ", ".join(words)


def _shorter(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


def timelines(results: Results, setting: Setting, path: Path) -> Path | None:
    """Draw the guest's speed against its undisturbed one, a row for each contender."""
    colour = colours(results.contenders)
    found: dict[str, list[Sample]] = {name: [] for name in results.players(setting.name)}
    for one in results.samples:
        if one.setting == setting.name and one.baseline_per_s and one.timeline:
            found.setdefault(one.contender, []).append(one)
    rows = [(name, samples) for name, samples in found.items() if samples]
    if not rows:
        return None
    last_s = _last_s(samples for _, samples in rows)
    figure = Figure(figsize=(WIDTH_IN, 1.1 + 0.95 * len(rows)), layout="constrained")
    all_axes = figure.subplots(len(rows), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, samples) in zip(all_axes, rows, strict=True):
        chosen = _middle(samples)
        for sample in samples:
            _line(axes, sample, colour[name], bold=sample is chosen)
        _marks(axes, chosen)
        axes.set_xlim(-1.0, last_s)
        axes.set_ylim(0, 125)
        axes.set_yticks([0, 50, 100])
        axes.tick_params(labelsize=SMALL)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(name, fontsize=9, loc="left", pad=3, fontweight="bold")
        note = _shorter(_told(chosen, last_s), 80)
        axes.set_title(note, fontsize=SMALL, loc="right", pad=3, parse_math=False)
    without = [name for name in results.players(setting.name) if name not in dict(rows)]
    told = [f"{name} ({fate(results, setting, name)})" for name in without]
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
        handles=handles, fontsize=SMALL, ncols=2, loc="outside lower center", frameon=False
    )
    return save(figure, path)
