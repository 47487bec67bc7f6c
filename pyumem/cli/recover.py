# SPDX-License-Identifier: GPL-2.0-or-later
"""umemctl recover."""

from __future__ import annotations

import click

from pyumem import runtime
from pyumem.address import parse
from pyumem.cli.completion import vm_leaving
from pyumem.control import ControlClient


@click.command()
@click.argument("vm", shell_complete=vm_leaving)
@click.argument("uri", required=False)
def command(vm: str, uri: str | None) -> None:
    """Have a migration of VM that is under way connect anew, now.

    For one that is postcopy-paused and tries again by itself, ever less often; and for one whose
    destination is to be reached at another address (URI, tcp:HOST:PORT) from now on.  Only pages
    that the destination lacks are sent again.

    When its `umemctl migrate` is gone, it is `umemctl migrate --resume --vm VM` that goes on.

    \b
    Examples:
      umemctl recover vm1
      umemctl recover vm1 tcp:198.51.100.7:4444
    """
    question = {"to": str(parse(uri, listening=False))} if uri else {}
    with ControlClient(runtime.migrate_dir() / f"{runtime.check_name(vm)}.sock") as client:
        client.ask("recover", **question)
    click.echo(f"{vm}: connecting anew{f' to {uri}' if uri else ''}")
