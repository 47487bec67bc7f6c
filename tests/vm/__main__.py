# SPDX-License-Identifier: GPL-2.0-or-later
"""Command line of the test machine: python -m tests.vm run [OPTIONS] [-- CMD...]."""

import os
import shlex
import shutil
import sys

import click

from tests.vm import harness


@click.group()
def main() -> None:
    """Boot the test machine."""


@main.command()
@click.option("--kernel", type=click.Choice(harness.KERNELS), default="6.1", show_default=True)
@click.option("--mem", default="4G", show_default=True, help="Memory of the machine.")
@click.option("--cpus", default=2, show_default=True, help="Processors of the machine.")
@click.option("--name", default="vm", show_default=True, help="Name of the log files.")
@click.option("--timeout", default=3600.0, show_default=True, help="Seconds until it is killed.")
@click.option("--no-module", is_flag=True, help="Do not load umem.ko.")
@click.option("--ignore-log", is_flag=True, help="Do not fail for the kernel log.")
@click.option("--tty", is_flag=True, help="Tell the command of our terminal, if we have one.")
@click.option("--env", multiple=True, metavar="NAME=VALUE", help="Environment of the command.")
@click.option("--shell-command", "shell_text", help="The command as one shell text.")
@click.argument("command", nargs=-1)
def run(
    kernel: str,
    mem: str,
    cpus: int,
    name: str,
    timeout: float,
    no_module: bool,
    ignore_log: bool,
    tty: bool,
    env: tuple[str, ...],
    shell_text: str | None,
    command: tuple[str, ...],
) -> None:
    """Run COMMAND in the machine, or a shell without one.

    The exit status is the command's; 86 when it was 0 but the kernel log is
    bad, 87 when the machine died, 124 when it took too long.
    """
    text = shell_text or (shlex.join(command) if command else None)
    variables = dict(pair.split("=", 1) for pair in env)
    if tty and sys.stdout.isatty():
        # Standard output is a pipe all the way; who draws has to be told.
        size = shutil.get_terminal_size()
        variables |= {"UMEM_TTY": "1", "TERM": os.environ.get("TERM", "dumb")}
        variables |= {"COLUMNS": str(size.columns), "LINES": str(size.lines)}
    config = harness.VmConfig(
        kernel=kernel,
        command=text,
        memory=mem,
        cpus=cpus,
        name=name,
        timeout=timeout,
        module=not no_module,
        ignore_log=ignore_log,
        env=variables,
    )
    try:
        sys.exit(harness.run(config))
    except harness.VmError as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main(prog_name="python -m tests.vm")
