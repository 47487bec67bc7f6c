# SPDX-License-Identifier: GPL-2.0-or-later
"""umemctl serve."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

import click

from pyumem.address import parse
from pyumem.area import HOST_PAGE, Granule
from pyumem.cli.common import security_of, security_options
from pyumem.cli.logs import log_format_option, log_to_stderr
from pyumem.serve import Daemon
from pyumem.uapi import GRANULE_MAX, PAGE_SIZE

_NAMES: Final = ("4K", "8K", "16K", "32K", "64K", "128K", "256K", "512K", "1M", "2M")
_GRANULES: Final = {
    name: Granule(4096 << at)
    for at, name in enumerate(_NAMES)
    if PAGE_SIZE <= 4096 << at <= GRANULE_MAX
} | {"huge": Granule(GRANULE_MAX, huge=True)}


@click.command()
@security_options
@click.option(
    "--granule",
    type=click.Choice(tuple(_GRANULES)),
    help="How much of a VM's memory comes at a request and is served at once, with `huge` as huge "
    "pages of 2 MiB; not less than a page of this host, which it is by default.  The source needs "
    "nothing of it.",
)
@click.option(
    "--metrics",
    metavar="tcp:HOST:PORT",
    help="Answer Prometheus there, in clear, whoever asks; tcp::PORT is loopback.  Default: "
    "nowhere.",
)
@log_format_option
@click.option("-v", "--verbose", is_flag=True, help="Log more.")
def command(
    token_file: Path | None,
    tls_creds: Path | None,
    insecure: bool,
    granule: str | None,
    metrics: str | None,
    log_format: str,
    verbose: bool,
) -> None:
    """Receive VMs on this host: the daemon that `umem-qemu ... -postcopy -incoming` asks for RAM.

    It stays in the foreground and logs one line per event to standard error.  One daemon runs per
    runtime directory.  It needs access to /dev/umem (see `umemctl check`).

    SIGTERM and SIGINT end it: QEMUs that still wait for their VM are ended, migrations before their
    commit are given up (their VMs go on at the source).  While a guest here still gets its memory
    through the daemon, the first signal only says so; a second one within a minute ends it, and the
    guest then waits for its missing pages.

    Ports that VMs are expected on are on this host's loopback, unless there are TLS credentials or
    --insecure.

    \b
    Examples:
      umemctl serve
      umemctl serve --tls-creds /etc/pki/umem
      umemctl serve --token-file /root/umem.token
      umemctl serve --granule 64K
      umemctl serve --metrics tcp:127.0.0.1:9464 --log-format json
    """
    names: set[str] = set()
    log_to_stderr(log_format, names=names, verbose=verbose)
    security = security_of(token_file, tls_creds, insecure=insecure)
    if security.credentials:
        security.credentials.server_context()  # what is wrong with them is told now
    area_granule = _GRANULES[granule] if granule else HOST_PAGE
    address = parse(metrics, listening=True) if metrics else None
    asyncio.run(Daemon(security, area_granule, metrics=address, names=names).run())
