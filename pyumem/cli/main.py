# SPDX-License-Identifier: GPL-2.0-or-later
"""The group of commands, and how an error becomes a line and an exit status."""

from __future__ import annotations

import importlib
import logging
import sys
from typing import Final

import click

import pyumem
from pyumem.errors import UmemError

COMMANDS: Final = {
    "background": "switch the background transfer of a running migration on or off, or limit it",
    "check": "check that this host can send or receive a VM",
    "completion": "print the script with which a shell completes umemctl",
    "list": "list the driver's areas",
    "migrate": "send a VM to another host",
    "recover": "have a migration connect anew, perhaps to another address",
    "report": "show how migrations from and to this host went",
    "serve": "receive VMs (daemon)",
    "switch": "end the pre-copy of a running migration, and post-copy the rest",
    "status": "show VMs that are expected and migrations that run",
    "top": "watch them",
}

_EPILOG: Final = """\
\b
Exit status:
  0    done
  1    failed; the VM runs where it ran
  2    the command line makes no sense
  3    refused by the peer, or a check failed
  4    the VM needs you: lost after the commit, or it could not be continued
  130  interrupted before the commit; the VM runs at the source

\b
Environment:
  UMEM_RUNTIME_DIR  sockets and locks; default /run/umem for root and for who may have VMs there,
                    else $XDG_RUNTIME_DIR/umem
  UMEM_RAM          area, file or auto: what umem-qemu makes the RAM of VMs that may leave
  UMEM_RAM_DIR      RAM files of VMs that umem-qemu starts; default /dev/shm/umem for root
"""


def _tell(error: UmemError) -> None:
    from pyumem.cli.logs import is_json

    if is_json():
        logging.getLogger("umemctl").error("%s", error)
    else:
        click.echo(f"umemctl: {error}", err=True)


class _Commands(click.Group):
    """Imports a command when it is used: `status` should not wait for what only `migrate` needs."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 (click's)
        return sorted(COMMANDS)

    def get_command(
        self,
        ctx: click.Context,  # noqa: ARG002 (click's)
        cmd_name: str,
    ) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"pyumem.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(
        self,
        ctx: click.Context,  # noqa: ARG002 (click's)
        formatter: click.HelpFormatter,
    ) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(sorted(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except UmemError as e:
            _tell(e)
            sys.exit(e.exit_status)


@click.group(
    cls=_Commands, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(pyumem.__version__, prog_name="umemctl")
def main() -> None:
    """Post-copy live migration of QEMU VMs on the umem driver.

    The destination runs `umemctl serve` and a QEMU started by `umem-qemu ... -postcopy -incoming`;
    the source runs `umemctl migrate`.
    """
