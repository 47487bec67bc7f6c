# SPDX-License-Identifier: GPL-2.0-or-later
"""umemctl check."""

from __future__ import annotations

import os

import click

from pyumem.checks import Level, all_checks
from pyumem.cli.common import json_option, print_json
from pyumem.errors import CheckError

_COLOURS = {Level.OK: "green", Level.NOTE: "yellow", Level.BAD: "red"}


@click.command()
@click.option(
    "--qemu",
    default=lambda: os.environ.get("UMEM_QEMU", "qemu-system-x86_64"),
    help="QEMU to look at.  Default: $UMEM_QEMU, else qemu-system-x86_64.",
)
@json_option
def command(qemu: str, as_json: bool) -> None:
    """Check that this host can send or receive a VM, and name the command that mends what is not.

    Looks at the driver and its permissions, QEMU and its migration capabilities, KVM, huge pages,
    free memory, room for RAM files, the token and the daemon.  Exit status 3 when something is
    essential and not right.

    \b
    Examples:
      umemctl check
      umemctl check --qemu /opt/qemu/bin/qemu-system-x86_64 --json
    """
    findings = []
    for finding in all_checks(qemu):
        findings.append(finding)
        if as_json:
            continue
        mark = click.style(f"{finding.level.value:4}", fg=_COLOURS[finding.level])
        click.echo(f"{mark}  {finding.what}: {finding.text}")
        if finding.fix:
            click.echo(f"      fix: {finding.fix}")
    bad = [finding.what for finding in findings if finding.level is Level.BAD]
    if as_json:
        print_json(
            {
                "ok": not bad,
                "checks": [
                    {"what": f.what, "level": f.level.value, "text": f.text, "fix": f.fix}
                    for f in findings
                ],
            }
        )
    if bad:
        raise CheckError(f"this host is not ready: {', '.join(bad)}")
