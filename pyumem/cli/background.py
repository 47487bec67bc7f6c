# SPDX-License-Identifier: GPL-2.0-or-later
"""umemctl background."""

from __future__ import annotations

import click

from pyumem import runtime
from pyumem.control import ControlClient


@click.command()
@click.argument("vm")
def command(vm: str) -> None:
    """Start the background transfer of a migration of VM that was started with `migrate -p -n`.

    With -n only pages that the guest touches are sent, so such a migration ends only when it has
    touched all of them.  This lets it end.

    \b
    Example:
      umemctl background vm1
    """
    path = runtime.migrate_dir() / f"{runtime.check_name(vm)}.sock"
    with ControlClient(path) as client:
        client.ask("background", on=True)
    click.echo(f"{vm}: background transfer on")
