# SPDX-License-Identifier: GPL-2.0-or-later
"""umemctl report."""

from __future__ import annotations

import json
from typing import Any

import click

from pyumem import reports
from pyumem.cli.common import json_option, plain, print_json, size
from pyumem.cli.display import faults_text, number, show_report
from pyumem.report import report_of
from pyumem.reports import Side


@click.command()
@click.argument("vm", required=False)
@click.option(
    "--last",
    type=click.IntRange(min=1),
    default=None,
    metavar="N",
    help="The last N reports, oldest first.  Default: 1; with --json all.",
)
@json_option
def command(vm: str | None, last: int | None, as_json: bool) -> None:
    """Show how migrations from and to this host went, of VM or of any.

    Both sides leave a report when a migration is over, also one that failed: the source, by
    `umemctl migrate`, with the downtime and what was sent; the destination, by `umemctl serve`,
    with what came, on which lane, and how long the guest waited for it.  The last 50 are kept in
    reports/ of the runtime directory.  Exit status 1 when there is none.

    \b
    Examples:
      umemctl report
      umemctl report vm1 --last 2
      umemctl report --json | jq '.reports[] | [.vm, .side, .downtime_ms]'
    """
    found = reports.read(vm, last or (None if as_json else 1))
    if as_json:
        print_json({"reports": found})
    for one in () if as_json else found:
        try:
            _show(one)
        except (LookupError, TypeError, ValueError):
            # Of another version: what it says is better than nothing.
            click.echo(plain(json.dumps(one)))
    if not found:
        click.echo(f"umemctl: no report of {vm or 'any VM'} here", err=True)
        raise SystemExit(1)


def _show(told: dict[str, Any]) -> None:
    click.echo(f"{told['vm']}, {told['side']}, {plain(told['ended_at'])}")
    if told["side"] == Side.SOURCE:
        show_report(report_of(told))
    else:
        _show_arrival(told)


def _show_arrival(told: dict[str, Any]) -> None:
    """Print the destination's."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    latency = " / ".join(
        number(told[f"demand_latency_{which}_us"], "us", 0) for which in ("p50", "p99", "max")
    )
    rows: dict[str, object] = {
        "VM": f"{told['vm']} from {told['peer']}",
        "result": told["state"],
        "RAM": f"{size(told['ram_bytes'])}, {told['pages_total']} pages of "
        f"{told['page_size_bytes']} bytes",
        "time to fully resident": number(told["time_to_resident_s"], "s", 2),
        "total time": number(told["total_s"], "s", 2),
        "pages on demand": told["pages_demand"],
        "pages that came unasked": told["pages_prefetched"],
        "pages in background": told["pages_background"],
        "zero pages": told["pages_zero"],
        "requests": told["requests"],
        "demand latency p50/p99/max": latency,
        "faults that waited": faults_text(told["faults_major"], told["blocked_ms"]),
        "for a page asked for already": told["faults_duplicate"],
    }
    rows |= {
        f"bytes on {lane}": size(nr_bytes)
        for lane, nr_bytes in told["bytes_received_by_lane"].items()
    }
    rows["taken up again"] = told["recoveries"]
    rows["the VM ended"] = told["guest_ended"] or None
    rows["error"] = told["error"] or None
    table = Table(show_header=False)
    for label, value in rows.items():
        if value is not None:
            table.add_row(label, Text(plain(value)))
    Console().print(table)
