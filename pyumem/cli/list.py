# SPDX-License-Identifier: GPL-2.0-or-later
"""umemctl list."""

from __future__ import annotations

import os

import click

from pyumem import uapi
from pyumem.area import node_path
from pyumem.cli.common import json_option, print_json, share, size


@click.command(name="list")
@json_option
def command(as_json: bool) -> None:
    """List the areas that the driver has, with what is cached of each.

    An area that has no server and is not complete has a guest that waits for the rest.

    \b
    Examples:
      umemctl list
      umemctl list --json
    """
    control = uapi.open_control()
    try:
        areas = uapi.list_areas(control)
    finally:
        os.close(control)
    if as_json:
        print_json(
            [
                {
                    "id": area.id,
                    "name": area.name,
                    "node": node_path(area.id) if area.has_node else None,
                    "size_bytes": area.size,
                    "granule_size_bytes": area.granule_size,
                    "cached_bytes": area.nr_cached * area.granule_size,
                    "requests_delivered": area.nr_delivered,
                    "served": area.served,
                    "complete": area.complete,
                    "mapped": area.mapped,
                    "server_pid": area.server_pid,
                    "owner_uid": area.owner_uid,
                }
                for area in areas
            ]
        )
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("node", "name", "size", "cached", "server", "mapped", "owner")
    for area in areas:
        table.add_row(
            node_path(area.id) if area.has_node else "-",
            area.name or "-",
            size(area.size),
            share(area.nr_cached, area.nr_granules),
            f"pid {area.server_pid}" if area.served else "none",
            "yes" if area.mapped else "no",
            f"uid {area.owner_uid}",
        )
    Console().print(table)
