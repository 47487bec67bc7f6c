# SPDX-License-Identifier: GPL-2.0-or-later
"""The report of a run: a page of HTML with plots, or tables for a terminal.

python -m bench.migration.report build/bench/migration/migration.json --out /tmp/report
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import click
import jinja2
from rich.console import Console
from rich.table import Table

from bench.migration.plan import BY_NAME
from bench.migration.results import PEER, Results, Setting, link_name, wanted

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
    ("demand_p99_us", "p99, us", 0),
    ("background_mib_s", "background, MiB/s", 0),
)
EXPLAINED: Final = (
    ("downtime", "from QEMU's STOP at the source to its RESUME at the destination"),
    ("silence", "longest time without a beat (10 ms) of the guest, until 2 s after the end"),
    ("total", "from the command to its end, with the start of its processes"),
    ("resident", "from STOP until every page was at the destination"),
    ("source free", "from the command until STOP"),
    ("blocked", "QEMU: of its vCPU threads, by its own count; umem: of every thread that waited"),
    ("work lost", "seconds of the guest's undisturbed work that were not done, until 2 s after"),
    ("speed beside", "of vCPUs that fault nothing, from the switch on, against before"),
)

_PAGE: Final = Path(__file__).with_name("report.html.j2")


def _cell(results: Results, setting: str, contender: str, what: str, digits: int) -> str:
    values = results.values(setting, contender, what)
    if not values:
        return "-"
    text = f"{results.median(setting, contender, what):.{digits}f}"
    if max(values) > min(values):
        text += f" [{min(values):.{digits}f}..{max(values):.{digits}f}]"
    ratio = results.ratio(setting, contender, what, PEER) if contender != PEER else None
    return text if ratio is None else f"{text}, x{ratio:.2g}"


def _rows(results: Results, setting: Setting) -> list[list[str]]:
    rows = []
    for name in results.contenders:
        cells = [_cell(results, setting.name, name, what, digits) for what, _, digits in FIGURES]
        rows.append([name, *cells])
    return rows


def tables(results: Results) -> list[Table]:
    """Return the report as tables of rich."""
    goals = Table(title="What is wanted of umem-postcopy", title_justify="left")
    for title in ("ratio", "setting", "measured", "wanted", ""):
        goals.add_column(title)
    for one in wanted(results):
        sign = "<=" if one.at_most else ">="
        verdict = "[green]met[/green]" if one.met else "[red]MISSED[/red]"
        goals.add_row(one.what, one.setting, f"{one.measured:.2f}", f"{sign} {one.limit}", verdict)
    found = [goals]
    for setting in results.settings:
        table = Table(title=f"{setting.name} ({link_name(setting)})", title_justify="left")
        rows = _rows(results, setting)
        used = [0, *(n for n in range(1, len(FIGURES) + 1) if any(row[n] != "-" for row in rows))]
        titles = ["contender", *(title for _, title, _ in FIGURES)]
        for n in used:
            table.add_column(titles[n], justify="left" if not n else "right")
        for row in rows:
            table.add_row(*(row[n] for n in used))
        found.append(table)
    return found


def _list_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f".. list-table:: {title}", "   :header-rows: 1", ""]
    for row in (head, *rows):
        lines += [f"   {'*' if n == 0 else ' '} - {cell}" for n, cell in enumerate(row)]
    return "\n".join(lines) + "\n"


def rst(results: Results) -> str:
    """Return the figures as tables for Documentation/."""
    facts = ", ".join(f"{name} {value}" for name, value in results.environment.items())
    parts = [".. Written by python -m bench.migration.report --rst.\n"]
    parts.append(f"``{results.command}``: {facts}.\n")
    goals = [
        (
            one.what,
            one.setting,
            f"{one.measured:.2f}",
            f"{'at most' if one.at_most else 'at least'} {one.limit}",
            "met" if one.met else "**missed**",
        )
        for one in wanted(results)
    ]
    titles = ["umem-postcopy", "setting", "measured", "wanted", ""]
    parts.append(_list_table("What is wanted", titles, goals))
    limits = [
        (
            name,
            *(f"{value:.0f}" for value in (one.request_p50_us, one.request_p99_us)),
            f"{one.stream_mib_s:.0f}",
        )
        for name, one in results.limits.items()
    ]
    titles = ["link", "request p50, us", "p99, us", "stream, MiB/s"]
    parts.append(_list_table("The links by themselves", titles, limits))
    for setting in results.settings:
        rows = _rows(results, setting)
        used = [n for n in range(len(FIGURES) + 1) if any(row[n] != "-" for row in rows)]
        titles = ["contender", *(title for _, title, _ in FIGURES)]
        title = f"{setting.name}: median [least..most], x times {PEER} in the same round"
        shown = [[row[n] for n in used] for row in rows]
        parts.append(_list_table(title, [titles[n] for n in used], shown))
    failed = [
        f"* {one.setting}, {one.contender}, round {one.round + 1}: {one.error}"
        for one in results.samples
        if not one.ok
    ]
    if failed:
        parts.append("Not over, or failed:\n\n" + "\n".join(failed) + "\n")
    return "\n".join(parts)


def write(results: Results, folder: Path) -> Path:
    """Write the page with its plots; returns where it is."""
    # What only measures need not have it, and the test machine does not.
    from bench.migration.plots import draw

    plots = draw(results, folder)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    html = environment.from_string(_PAGE.read_text()).render(
        results=results,
        wanted=wanted(results),
        failed=[one for one in results.samples if not one.ok],
        titles=[title for _, title, _ in FIGURES],
        rows=lambda setting: _rows(results, setting),
        link=link_name,
        plots=plots,
        peer=PEER,
        contenders=[(n, BY_NAME[n].text) for n in results.contenders if n in BY_NAME],
        explained=EXPLAINED,
    )
    page = folder / "index.html"
    page.write_text(html)
    return page


@click.command()
@click.argument("path", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder.  Default: beside the file.")
@click.option("--text", is_flag=True, help="Tables on the terminal, and no page.")
@click.option("--rst", "as_rst", is_flag=True, help="Tables for Documentation/, and no page.")
def main(path: Path, out: Path | None, text: bool, as_rst: bool) -> None:
    """Show what a run of the bench found."""
    try:
        results = Results.from_json(json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise click.ClickException(f"{path}: not results of this bench: {e!r}") from None
    if text:
        console = Console()
        for table in tables(results):
            console.print(table)
        return
    if as_rst:
        click.echo(rst(results))
        return
    click.echo(write(results, out or path.with_suffix("")))


if __name__ == "__main__":
    main(prog_name="python -m bench.migration.report")
