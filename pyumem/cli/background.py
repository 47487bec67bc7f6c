# SPDX-License-Identifier: GPL-2.0-or-later
"""umemctl background."""

from __future__ import annotations

from typing import Any

import click

from pyumem import runtime
from pyumem.cli.common import max_bandwidth_option, size
from pyumem.cli.completion import vm_leaving
from pyumem.control import ControlClient


@click.command()
@click.argument("vm", shell_complete=vm_leaving)
@click.option("--on/--off", default=True, help="Switch it on (the default) or off.")
@max_bandwidth_option
@click.pass_context
def command(ctx: click.Context, vm: str, on: bool, max_bandwidth: int | None) -> None:
    """Switch the background transfer of a running migration of VM on or off, or limit it.

    Without it only pages that the guest touches are sent, as with `migrate -p -n`, and the
    migration ends only when it has touched all of them.

    \b
    Examples:
      umemctl background vm1
      umemctl background vm1 --off
      umemctl background vm1 --max-bandwidth 100M
      umemctl background vm1 --max-bandwidth none
    """
    question: dict[str, Any] = {"on": on}
    given = ctx.get_parameter_source("max_bandwidth") is not click.core.ParameterSource.DEFAULT
    if given:
        question["max_bandwidth_bytes_s"] = max_bandwidth
    path = runtime.migrate_dir() / f"{runtime.check_name(vm)}.sock"
    with ControlClient(path) as client:
        client.ask("background", **question)
    limit = f", at most {size(max_bandwidth)}/s" if max_bandwidth else ", no limit" * given
    click.echo(f"{vm}: background transfer {'on' + limit if on else 'off'}")
