# SPDX-License-Identifier: GPL-2.0-or-later
"""umemctl status."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

import click

from pyumem import runtime
from pyumem.cli.common import json_option, plain, print_json, share, size
from pyumem.control import ControlClient
from pyumem.errors import ControlError
from pyumem.report import State

_ANSWER_S = 5.0


def ask_serve(**more: object) -> dict[str, Any] | None:
    """Return what the daemon of this host says, None when it does not."""
    try:
        with ControlClient(runtime.serve_socket(), timeout=_ANSWER_S) as client:
            return client.ask("status", **more)
    except ControlError:
        return None


def ask_migrations() -> list[dict[str, Any]]:
    """Return what each running `umemctl migrate` of this host says."""
    found = []
    for path in sorted(runtime.migrate_dir().glob("*.sock")):
        try:
            with ControlClient(path, timeout=_ANSWER_S) as client:
                found.append(client.ask("status"))
        except ControlError:
            continue  # it ended, or was killed and left its socket
    return found


def _find_kept(served: Collection[str]) -> list[dict[str, Any]]:
    """Return the VMs that left and whose `umemctl migrate` is no more, though they need it."""
    found = []
    for path in sorted(runtime.migrate_dir().glob("*.json")):
        if path.stem in served:
            continue
        left = runtime.has_left(path.stem)
        try:
            record = json.loads(path.read_text())
            ram = [str(block["path"]) for block in record["ram"]]
            destination = str(record["destination"])
        except (OSError, ValueError, LookupError, TypeError):
            ram, destination = [], "?"  # cut off by a full disk, say: it counts all the same
        found.append(
            {
                "name": path.stem,
                "state": (State.POSTCOPY_PAUSED if left else State.DEVICE).value,
                "destination": destination,
                "ram": ram,
                "record": str(path),
            }
        )
    return found


@click.command()
@json_option
def command(as_json: bool) -> None:
    """Show the VMs that this host expects and the migrations from and to it.

    Asks `umemctl serve` and every running `umemctl migrate` on this host through their sockets.
    Neither touches guest memory or waits for the network to answer.

    States of a migration: setup, device, postcopy-active, postcopy-paused (committed, but pages do
    not flow: the guest runs on with what it has), postcopy-recover (connected again), completed,
    failed, cancelled.  A VM that left and is not served any more, because its `umemctl migrate`
    ended before every page had moved, is shown as postcopy-paused with the memory that is kept for
    it here; `umemctl migrate --resume` goes on with it.  One that was killed before the commit,
    with its VM stopped here, is shown as device; the same command has the VM go on.  Exit status 1
    when there is nothing to show.

    \b
    Examples:
      umemctl status
      umemctl status --json | jq '.serve.vms[].state'
    """
    serve, migrations = ask_serve(), ask_migrations()
    kept = _find_kept({one["name"] for one in migrations})
    if as_json:
        print_json({"serve": serve, "migrations": migrations, "kept": kept})
    else:
        _show(serve, migrations, kept)
    if serve is None and not migrations and not kept:
        raise SystemExit(1)


def _show(
    serve: dict[str, Any] | None, migrations: list[dict[str, Any]], kept: list[dict[str, Any]]
) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # A name or an address is text here, neither markup ([fd00::1]) nor an emoji (tcp:a:1).
    console = Console(markup=False, emoji=False, highlight=False)
    if serve is None:
        console.print(f"no `umemctl serve` answers on {runtime.serve_socket()}")
    else:
        console.print(f"umemctl serve: pid {serve['pid']}, {len(serve['vms'])} VM(s) expected")
        for vm in serve["vms"]:
            console.print(_incoming_line(vm))
        for vm in serve["history"]:
            reason = f": {vm['reason']}" if vm["reason"] else ""
            console.print(f"  {vm['name']}: {vm['state']}{plain(reason)}")
    for one in kept:
        console.print(
            f"{one['name']}: {one['state']} at {plain(one['destination'])}, not served; "
            f"its memory is kept in {plain(', '.join(one['ram']) or '?')} (see {one['record']})",
            soft_wrap=True,  # paths are to be copied
        )
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
