# SPDX-License-Identifier: GPL-2.0-or-later
"""What the figures share: colours, axes, and how a value is written."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import matplotlib as mpl
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from bench.migration.plan import CONTENDERS
from bench.migration.results import Results, Setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

mpl.use("Agg")

# Okabe and Ito's colours, which colour-blind people can tell apart; QEMU's own are greys.
_COLOURS: Final = ("#56B4E9", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#8C6D1F")
_PEERS_COLOURS: Final = ("#1A1A1A", "#7A7A7A", "#4A4A4A", "#ABABAB")

_DPI: Final = 110
WIDTH_IN: Final = 9.0
"""So that a figure fits the page of the report as it is, at 100 %."""
_ROW_IN: Final = 0.25
"""Of a contender where a row is a bar."""
SMALL: Final = 8
"""Points."""


def colours(names: Sequence[str]) -> dict[str, str]:
    """Return a colour for each contender: the plan's have theirs, whoever else runs."""
    ours, peers = itertools.cycle(_COLOURS), itertools.cycle(_PEERS_COLOURS)
    every = dict.fromkeys([*(one.name for one in CONTENDERS), *names])
    found = {name: next(peers if name.startswith("qemu") else ours) for name in every}
    return {name: found[name] for name in names}


def save(figure: Figure, path: Path) -> Path:
    """Write the figure; returns where."""
    figure.savefig(path, dpi=_DPI)
    return path


def _tick(value: float, _: object = None) -> str:
    return f"{value:g}"


def number(value: float) -> str:
    """Return two digits, or all before the point: 0.056, 0.50, 5.0, 56, 560, 5600."""
    return f"{value:#.2g}" if 0 < abs(value) < 9.95 else f"{value:.0f}"


def log(axes: Axes, values: Iterable[float], most: float = 50.0) -> None:
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


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Make the y axis a row for each name, the first on top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(labelsize=SMALL)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def beside(axes: Axes, row: int, text: str) -> None:
    """Write a value to the right of the axes, where it covers nothing."""
    where = axes.get_yaxis_transform()
    axes.text(1.02, row, text, transform=where, fontsize=SMALL, va="center", clip_on=False)


def fate(results: Results, setting: Setting, name: str) -> str:
    """Say why a contender has no figure."""
    ran = [one for one in results.samples if (one.setting, one.contender) == (setting.name, name)]
    if not ran:
        return "not run"
    if any(one.ok for one in ran):
        return "-"
    return "not over" if all(one.error.startswith("not over") for one in ran) else "failed"


def height(rows: int, panels: int = 1) -> float:
    """Return the inches that so many rows, in panels one below the other, take."""
    return 0.75 + panels * (0.65 + _ROW_IN * rows)
