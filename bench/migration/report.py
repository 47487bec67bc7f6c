# SPDX-License-Identifier: GPL-2.0-or-later
"""The report of a run: a page of HTML with plots, or tables for a terminal or Documentation/.

python -m bench.migration.report build/bench/migration/migration.json --out /tmp/report
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import click
import jinja2
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.migration.plan import BY_NAME
from bench.migration.results import (
    OURS,
    PEER,
    Results,
    Sample,
    Setting,
    Wanted,
    link_name,
    unmeasured,
    wanted,
)

FIGURES: Final = (
    ("downtime_ms", "downtime, ms", 0),
    ("silence_ms", "silence, ms", 0),
    ("total_s", "total, s", 1),
    ("resident_s", "resident, s", 2),
    ("source_free_s", "source free, s", 1),
    ("blocked_ms", "blocked, ms", 0),
    ("work_lost_s", "work lost, s", 1),
    ("compute_share", "speed beside", 2),
    ("wire_mib", "wire, MiB", 0),
    ("demand_p50_us", "demand p50, us", 0),
    ("demand_p99_us", "demand p99, us", 0),
    ("background_mib_s", "stream, MiB/s", 0),
)
EXPLAINED: Final = (
    ("downtime", "from QEMU's STOP at the source to its RESUME at the destination"),
    ("silence", "longest time without a beat (10 ms) of the guest, until 2 s after the end"),
    ("total", "from the command to its end, with the start of its processes"),
    ("resident", "from STOP until every page was at the destination"),
    ("source free", "from the command until STOP"),
    ("blocked", "QEMU: of its vCPU threads, by its own count; umem: of every thread that waited"),
    ("work lost", "seconds of the guest's undisturbed work that were not done, until 2 s after"),
    ("stream", "pages that came unasked, from the switch until resident"),
    ("speed beside", "of vCPUs that fault nothing, from the switch on, against before"),
)

_PAGE: Final = Path(__file__).with_name("report.html.j2")


@dataclass(frozen=True)
class Cell:
    """A figure of one contender in one setting, as text; empty what there is none of."""

    median: str = "-"
    spread: str = ""
    """[least-most] of the rounds."""
    ratio: str = ""
    """(xN), the median of the rounds' ratios to QEMU's post-copy."""

    def __str__(self) -> str:
        """Return all of it in a line."""
        return " ".join(part for part in (self.median, self.spread, self.ratio) if part)


@dataclass(frozen=True)
class Row:
    """One contender in one setting."""

    contender: str
    rounds: str
    """How many came to their end: `3`, `2 of 3`."""
    cells: list[Cell]


def _cell(results: Results, setting: str, contender: str, what: str, digits: int) -> Cell:
    values = results.values(setting, contender, what)
    if not values:
        return Cell()
    spread = ""
    if max(values) > min(values):
        spread = f"[{min(values):.{digits}f}–{max(values):.{digits}f}]"  # noqa: RUF001
    ratio = results.ratio(setting, contender, what, PEER) if contender != PEER else None
    return Cell(
        f"{results.median(setting, contender, what):.{digits}f}",
        spread,
        "" if ratio is None else f"(×{_short(ratio)})",  # noqa: RUF001
    )


def _short(ratio: float) -> str:
    return f"{ratio:.0f}" if abs(ratio) >= 100 else f"{ratio:.2g}"


def rows_of(results: Results, setting: Setting) -> list[Row]:
    """Return the setting's table: who met it, also with nothing to show."""
    found = []
    for name in results.players(setting.name):
        ran = sum((one.setting, one.contender) == (setting.name, name) for one in results.samples)
        ended = len(results.of(setting.name, name))
        rounds = str(ended) if ended == ran else f"{ended} of {ran}"
        cells = [_cell(results, setting.name, name, what, digits) for what, _, digits in FIGURES]
        found.append(Row(name, rounds, cells))
    return found


def _used(rows: Sequence[Row]) -> list[int]:
    """Return which of FIGURES anybody has."""
    return [n for n in range(len(FIGURES)) if any(row.cells[n] != Cell() for row in rows)]


def _failed(results: Results) -> list[Sample]:
    return [one for one in results.samples if not one.ok]


def _why(sample: Sample) -> str:
    return sample.error or "the guest's memory is damaged"


def _goals(results: Results) -> list[tuple[Wanted, str]]:
    """Return all goals with what is made of them: met, MISSED or not measured."""
    found = [(one, "met" if one.met else "MISSED") for one in wanted(results)]
    return found + [(one, "not measured") for one in unmeasured(results)]


# --- for a terminal ---


def _goal_table(results: Results) -> Table:
    table = Table(title=f"What is wanted of {OURS}", title_justify="left")
    for title in ("ratio", "setting", "measured", "wanted", ""):
        table.add_column(title)
    colour = {"met": "green", "MISSED": "red", "not measured": "yellow"}
    for one, verdict in _goals(results):
        measured = "-" if verdict == "not measured" else f"{one.measured:.2f}"
        limit = f"{'<=' if one.at_most else '>='} {one.limit:g}"
        told = f"[{colour[verdict]}]{verdict}[/]"
        table.add_row(one.what, one.setting, measured, limit, told)
    return table


def _failed_table(results: Results) -> Table:
    table = Table(title="Not over, or failed", title_justify="left")
    for title in ("setting", "contender", "round", "why"):
        table.add_column(title)
    for one in _failed(results):
        # What a program said is no markup.
        table.add_row(one.setting, one.contender, str(one.round + 1), escape(_why(one)))
    return table


def _setting_table(results: Results, setting: Setting) -> Table:
    title = f"{setting.name} ({link_name(setting)}), medians (times {PEER})"
    # Without lines between them all columns have room on a terminal of 140.
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    table.show_edge = table.pad_edge = False
    rows = rows_of(results, setting)
    used = _used(rows)
    table.add_column("contender", no_wrap=True)
    table.add_column("rounds", justify="right")
    for n in used:
        table.add_column(FIGURES[n][1], justify="right")
    for row in rows:
        # A terminal has no room for the spread as well: that is on the page.
        cells = (f"{row.cells[n].median}\n{row.cells[n].ratio}".strip() for n in used)
        table.add_row(row.contender, row.rounds, *cells)
    return table


def tables(results: Results) -> list[Table]:
    """Return the report as tables of rich: the goals, what failed, the medians."""
    found = [_goal_table(results)]
    if _failed(results):
        found.append(_failed_table(results))
    return found + [_setting_table(results, setting) for setting in results.settings]


# --- for Documentation/ ---


def _list_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f".. list-table:: {title}", "   :header-rows: 1", ""]
    for row in (head, *rows):
        lines += [f"   {'*' if n == 0 else ' '} - {cell}".rstrip() for n, cell in enumerate(row)]
    return "\n".join(lines) + "\n"


def _rst_goals(results: Results) -> str:
    """Return a row for each setting, a column for each goal."""
    goals: dict[str, str] = {}
    told: dict[str, dict[str, str]] = {}
    for one, verdict in _goals(results):
        goals[one.what] = f"{one.what}, {'at most' if one.at_most else 'at least'} {one.limit:g}"
        figure = "?" if verdict == "not measured" else f"{one.measured:.2f}"
        cell = figure if verdict == "met" else f"**{figure}**"
        told.setdefault(one.setting, {})[one.what] = cell
    rows = [(name, *(cells.get(what, "") for what in goals)) for name, cells in told.items()]
    title = f"What is wanted of {OURS}: **missed**, **?** not measured"
    return _list_table(title, ["setting", *goals.values()], rows)


def rst(results: Results) -> str:
    """Return the figures as tables for Documentation/."""
    facts = ", ".join(f"{name} {value}" for name, value in results.environment.items())
    parts = [".. Written by python -m bench.migration.report --rst.\n"]
    parts += [f"``{results.command}``: {facts}.\n", _rst_goals(results)]
    limits = [
        (name, *(f"{n:.0f}" for n in (one.request_p50_us, one.request_p99_us, one.stream_mib_s)))
        for name, one in results.limits.items()
    ]
    titles = ["link", "request p50, us", "p99, us", "stream, MiB/s"]
    parts.append(_list_table("The links by themselves", titles, limits))
    for setting in results.settings:
        rows = rows_of(results, setting)
        used = _used(rows)
        title = f"{setting.name}: median [least–most], times {PEER} in the same round"  # noqa: RUF001
        titles = ["contender", "rounds", *(FIGURES[n][1] for n in used)]
        shown = [[row.contender, row.rounds, *(str(row.cells[n]) for n in used)] for row in rows]
        parts.append(_list_table(title, titles, shown))
    failed = [
        f"* {one.setting}, {one.contender}, round {one.round + 1}: {' '.join(_why(one).split())}"
        for one in _failed(results)
    ]
    if failed:
        parts.append("Not over, or failed:\n\n" + "\n".join(failed) + "\n")
    return "\n".join(parts)


# --- the page ---


def write(results: Results, folder: Path) -> Path:
    """Write the page with its plots; returns where it is."""
    # What only measures need not have it, and the test machine does not.
    from bench.migration.plots import draw

    plots = draw(results, folder)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    html = environment.from_string(_PAGE.read_text()).render(
        results=results,
        rounds=len({one.round for one in results.samples}),
        ours=OURS,
        goals=_goals(results),
        failed=[(one, _why(one)) for one in _failed(results)],
        titles=[title for _, title, _ in FIGURES],
        rows=lambda setting: rows_of(results, setting),
        link=link_name,
        plots=plots,
        peer=PEER,
        contenders=[(n, BY_NAME[n].text) for n in results.contenders if n in BY_NAME],
        explained=EXPLAINED,
    )
    page = folder / "index.html"
    page.write_text(html)
    return page


def load(path: Path) -> Results:
    """Read a file of results.  Raises click.ClickException with one line that says why not."""
    try:
        return Results.from_json(json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise click.ClickException(f"{path}: not results of this bench: {e!r}") from None


@click.command()
@click.argument("path", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder.  Default: beside the file.")
@click.option("--text", is_flag=True, help="Tables on the terminal, and no page.")
@click.option("--rst", "as_rst", is_flag=True, help="Tables for Documentation/, and no page.")
def main(path: Path, out: Path | None, text: bool, as_rst: bool) -> None:
    """Show what a run of the bench found."""
    results = load(path)
    if text:
        console = Console(width=None if sys.stdout.isatty() else 140)
        for table in tables(results):
            console.print(table)
        return
    if as_rst:
        click.echo(rst(results))
        return
    # A file without a suffix cannot be a folder as well.
    beside = path.with_suffix("") if path.suffix else path.with_name(f"{path.name}-report")
    click.echo(write(results, out or beside))


if __name__ == "__main__":
    main(prog_name="python -m bench.migration.report")
