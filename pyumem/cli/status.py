# SPDX-License-Identifier: GPL-2.0-or-later
"""umemctl status."""

from __future__ import annotations

from typing import Any

import click

from pyumem import runtime
from pyumem.cli.common import json_option, plain, print_json, share, size
from pyumem.control import ControlClient
from pyumem.errors import ControlError

_ANSWER_S = 5.0


def _ask_serve() -> dict[str, Any] | None:
    try:
        with ControlClient(runtime.serve_socket(), timeout=_ANSWER_S) as client:
            return client.ask("status")
    except ControlError:
        return None


def _ask_migrations() -> list[dict[str, Any]]:
    found = []
    for path in sorted(runtime.migrate_dir().glob("*.sock")):
        try:
            with ControlClient(path, timeout=_ANSWER_S) as client:
                found.append(client.ask("status"))
        except ControlError:
            continue  # it ended, or was killed and left its socket
    return found


@click.command()
@json_option
def command(as_json: bool) -> None:
    """Show the VMs that this host expects and the migrations from and to it.

    Asks `umemctl serve` and every running `umemctl migrate` on this host through their sockets.
    Neither touches guest memory or waits for the network to answer.

    States of a migration: setup, device, postcopy-active, postcopy-paused (committed, but pages do
    not flow: the guest waits), completed, failed, cancelled.  Exit status 1 when neither a daemon
    nor a migration is there.

    \b
    Examples:
      umemctl status
      umemctl status --json | jq '.serve.vms[].state'
    """
    serve, migrations = _ask_serve(), _ask_migrations()
    if as_json:
        print_json({"serve": serve, "migrations": migrations})
    else:
        _show(serve, migrations)
    if serve is None and not migrations:
        raise SystemExit(1)


def _show(serve: dict[str, Any] | None, migrations: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # markup=False: a name or an address in brackets is text here, not rich's markup.
    console = Console(markup=False, highlight=False)
    if serve is None:
        console.print(f"no `umemctl serve` answers on {runtime.serve_socket()}")
    else:
        console.print(f"umemctl serve: pid {serve['pid']}, {len(serve['vms'])} VM(s) expected")
        for vm in serve["vms"]:
            console.print(_incoming_line(vm))
        for vm in serve["history"]:
            reason = f": {vm['reason']}" if vm["reason"] else ""
            console.print(f"  {vm['name']}: {vm['state']}{plain(reason)}")
    if not migrations:
        return
    table = Table("VM", "to", "state", "pages", "demand", "background", "zero", "moved")
    for one in migrations:
        table.add_row(
            Text(one["name"]),
            Text(one["destination"]),
            one["state"],
            share(one["pages_done"], one["pages_total"]),
            *(str(one[f"pages_{kind}"]) for kind in ("demand", "background", "zero")),
            size(one["bytes_moved"]),
        )
    console.print(table)


def _incoming_line(vm: dict[str, Any]) -> str:
    areas = ", ".join(
        f"{a['id']} on {a['node']} {share(a['cached_bytes'], a['size_bytes'])} of "
        f"{size(a['size_bytes'])}"
        for a in vm["areas"]
    )
    line = f"  {vm['name']}: {vm['state']}, {vm['listen']}, {areas}"
    if migration := vm["migration"]:
        line += f", from {migration['peer']}"
        if migration["reason"]:
            line += f"\n    {plain(migration['reason'])}"
    return line
