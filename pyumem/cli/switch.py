# SPDX-License-Identifier: GPL-2.0-or-later
"""umemctl switch."""

from __future__ import annotations

import click

from pyumem import runtime
from pyumem.control import ControlClient


@click.command()
@click.argument("vm")
def command(vm: str) -> None:
    """End the pre-copy of a running migration of VM now: it stops here, runs at the destination,
    and the memory that is stale there by then follows by post-copy.

    Refused where `umemctl migrate` was given --no-postcopy, and when no round is under way.

    \b
    Example:
      umemctl switch vm1
    """
    with ControlClient(runtime.migrate_dir() / f"{runtime.check_name(vm)}.sock") as client:
        client.ask("switch")
    click.echo(f"{vm}: switching to post-copy")
