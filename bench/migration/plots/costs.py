# SPDX-License-Identifier: GPL-2.0-or-later
"""What a migration costs the hosts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from bench.migration.plots.drawing import (
    SMALL,
    WIDTH_IN,
    beside,
    fate,
    height,
    name_rows,
    number,
    save,
)
from bench.migration.results import Results, Sample, Setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Paul Tol's light ones: no contender's.
_PROCESS_COLOURS: Final = ("#77AADD", "#EEDD88", "#EE8866", "#99DDFF", "#FFAABB", "#BBCC33")
_PROCESSES: Final = ("source qemu", "destination qemu", "umemctl migrate", "umemctl serve")


def _mean(samples: Sequence[Sample], process: str, what: str) -> float:
    """Return the mean of a figure of a process: of medians a stack would be no sum."""
    values = [getattr(p, what) for one in samples for p in one.processes if p.name == process]
    return sum(values) / len(samples) if samples else 0.0


def _stack(
    axes: Axes, results: Results, setting: Setting, processes: dict[str, str], what: str
) -> None:
    name_rows(axes, results.players(setting.name))
    for row, name in enumerate(results.players(setting.name)):
        samples, left = results.of(setting.name, name), 0.0
        if not samples:
            beside(axes, row, fate(results, setting, name))
            continue
        for process, colour in processes.items():
            value = _mean(samples, process, what)
            axes.barh(row, value, 0.75, left=left, color=colour, edgecolor="white", lw=0.6)
            left += value
        beside(axes, row, number(left) if left else "-")
    axes.set_xlim(left=0)


def costs(results: Results, setting: Setting, path: Path) -> Path | None:
    """Draw processor time and the daemons' memory, stacked by process, for each contender."""
    names = results.players(setting.name)
    seen = {
        p.name for name in names for one in results.of(setting.name, name) for p in one.processes
    }
    if not seen:
        return None
    # Those that are known always have the same colour, as contenders do.
    every = [*_PROCESSES, *sorted(seen - set(_PROCESSES))]
    colour = dict(zip(every, itertools.cycle(_PROCESS_COLOURS), strict=False))
    shown = {name: colour[name] for name in every if name in seen}
    figure = Figure(figsize=(WIDTH_IN, height(len(names)) + 0.3), layout="constrained")
    cpu, memory = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    _stack(cpu, results, setting, shown, "cpu_s")
    cpu.set_xlabel("seconds of processor time; QEMU's has the guest's", fontsize=9)
    # QEMU's private memory may be all of the guest's.
    daemons = {name: one for name, one in shown.items() if "qemu" not in name}
    _stack(memory, results, setting, daemons, "peak_mib")
    memory.set_xlabel("peak private memory of umem's, MiB", fontsize=9)
    figure.legend(
        handles=[Patch(color=one, label=name) for name, one in shown.items()],
        fontsize=SMALL,
        ncols=4,
        loc="outside lower center",
        frameon=False,
    )
    figure.suptitle(f"{setting.name}: what it costs, mean of the rounds", fontsize=10)
    return save(figure, path)
