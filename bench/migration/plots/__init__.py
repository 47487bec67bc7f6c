# SPDX-License-Identifier: GPL-2.0-or-later
"""The figures of the report, as PNG files.

A contender has one colour in all of them, in every run, and its name beside what is drawn of it.
What there is no figure for is said, not left out: an empty row looks like a zero.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from bench.migration.plots.compared import absolutes, ratios
from bench.migration.plots.costs import costs
from bench.migration.plots.drawing import colours
from bench.migration.plots.pages import latencies, streams
from bench.migration.plots.speed import timelines
from bench.migration.results import Results

__all__ = ["PLOTS", "colours", "draw"]

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
