# SPDX-License-Identifier: GPL-2.0-or-later
"""umemctl migrate."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path
from typing import Any

import click

from pyumem import reports, runtime
from pyumem.address import parse
from pyumem.cli.common import (
    bandwidth,
    json_option,
    max_bandwidth_option,
    print_json,
    quiet_qmp,
    security_of,
    security_options,
)
from pyumem.cli.completion import vm_here
from pyumem.cli.display import make_display, show_report
from pyumem.cli.logs import LogDisplay, is_json, log_format_option, log_to_stderr
from pyumem.commit_record import CommitRecord, names
from pyumem.compression import Compress, offer
from pyumem.control import Asker, ControlServer
from pyumem.convergence import Limits
from pyumem.errors import ControlError, UmemError, UsageError
from pyumem.lanes.prefetch import MAX_PAGES, Prefetch
from pyumem.report import Report
from pyumem.serving import Resumed
from pyumem.source import Migration
from pyumem.source_base import Plan
from pyumem.tls import Security
from pyumem.wire import MAX_LANES


@click.command()
@click.argument("uri", required=False)
@click.option("-p", "postcopy", is_flag=True, help="Post-copy: run at the destination at once.")
@click.option(
    "--hybrid",
    is_flag=True,
    help="Pre-copy as long as it pays, then post-copy by itself: always comes to an end.",
)
@click.option(
    "--precopy-rounds",
    type=click.IntRange(1, 100),
    metavar="N",
    help="With -p: N rounds of pre-copy first.",
)
@click.option(
    "--max-downtime",
    type=click.IntRange(1, 60_000),
    default=300,
    show_default=True,
    metavar="MS",
    help="Pre-copy ends when the rest can be sent in so many milliseconds.",
)
@click.option(
    "--max-precopy-time",
    type=click.IntRange(1),
    metavar="S",
    help="Pre-copy for so many seconds at most; then --hybrid switches, and without it the VM "
    "stays.  Default: as long as less and less remains.",
)
@click.option(
    "--no-postcopy",
    is_flag=True,
    help="Never switch to post-copy, neither by itself nor by `umemctl switch`.",
)
@click.option(
    "-n",
    "on_demand_only",
    is_flag=True,
    help="No background transfer: send only pages that the guest touches.  The migration then ends "
    "when it has touched them all, or after `umemctl background VM`.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Go on with a VM that has left already and still needs its memory from here, when the "
    "`umemctl migrate` that sent it was killed or ended.  URI only if its address has changed.",
)
@click.option(
    "--qmp",
    type=click.Path(path_type=Path, dir_okay=False),
    help="QMP socket of the VM.  Default: that of the only VM that umem-qemu runs here.",
)
@click.option(
    "--vm",
    shell_complete=vm_here,
    help="Name of a VM that umem-qemu runs here, instead of --qmp.",
)
@click.option(
    "--lanes",
    type=click.IntRange(1, MAX_LANES),
    default=1,
    show_default=True,
    help="TCP connections for pages that nobody asked for yet, each with a process on both hosts; "
    "requested pages have one of their own besides.",
)
@click.option(
    "--compress",
    type=click.Choice([wish.value for wish in Compress]),
    default=Compress.AUTO.value,
    show_default=True,
    help="Compress pages that nobody asked for yet, with zstd.  auto: while that is faster, which "
    "each lane measures as it runs.",
)
@max_bandwidth_option
@click.option(
    "--release-ram",
    is_flag=True,
    help="Give memory back to this host as the destination confirms it, every few seconds and not "
    "only at the end.",
)
@click.option(
    "--prefetch-forward",
    type=click.IntRange(0, MAX_PAGES),
    default=0,
    show_default=True,
    help="Pages behind a requested one that follow it unasked, with -n too.  Adapts: up to 8 times "
    "as many while the guest reads on, fewer while it jumps about.",
)
@click.option(
    "--prefetch-backward",
    type=click.IntRange(0, MAX_PAGES),
    default=0,
    show_default=True,
    help="The same before a requested page.",
)
@security_options
@click.option(
    "--tls-hostname",
    default="",
    help="Name that the destination's certificate has to have, where that is not HOST of URI.",
)
@log_format_option
@json_option
def command(
    uri: str | None,
    postcopy: bool,
    hybrid: bool,
    precopy_rounds: int | None,
    max_downtime: int,
    max_precopy_time: int | None,
    no_postcopy: bool,
    on_demand_only: bool,
    resume: bool,
    qmp: Path | None,
    vm: str | None,
    lanes: int,
    compress: str,
    max_bandwidth: int | None,
    release_ram: bool,
    prefetch_forward: int,
    prefetch_backward: int,
    token_file: Path | None,
    tls_creds: Path | None,
    insecure: bool,
    tls_hostname: str,
    log_format: str,
    as_json: bool,
) -> None:
    """Send a VM to the host that expects it at URI (tcp:HOST:PORT).

    With -p the VM stops, its device state moves, and it runs at the destination, while its memory
    follows: pages that it touches first, the others behind them.  This command stays until every
    page is there.

    Without -p its memory goes first, while it runs here: all of it, then, round after round, what
    it wrote meanwhile, until the rest can be sent in --max-downtime.  Then it stops, the rest and
    the device state move, and it runs there with all its memory.  A VM that writes faster than the
    network takes it never comes to that: this command says so, and the VM stays.  With --hybrid,
    the recommended way, it switches to post-copy then, and so does `umemctl switch VM` at any time.

    There is one instant of commit.  Before it any failure, and Ctrl-C, leaves the VM running here.
    After it the VM runs at the destination only, needs its memory from here, and Ctrl-C is refused.

    When the connection is lost after the commit (postcopy-paused) the guest runs on with the memory
    that it has, and this command connects again, by itself, until it works; `umemctl recover` has
    it do so now, or to another address.  Ctrl-C leaves it then (exit status 4): the memory is kept,
    and `umemctl migrate --resume` goes on with it, also after this command or the host's other
    daemons were killed.

    All RAM of the VM has to be on shared files, as `umem-qemu` makes it.

    \b
    Examples:
      umemctl migrate --hybrid tcp:192.0.2.7:4444
      umemctl migrate --max-downtime 50 --max-precopy-time 600 tcp:192.0.2.7:4444
      umemctl migrate -p tcp:192.0.2.7:4444
      umemctl migrate -p tcp:192.0.2.7:4444 --qmp /run/umem/vm/vm1/qmp.sock
      umemctl migrate -p -n tcp:[2001:db8::7]:4444 --vm vm1
      umemctl migrate -p -n --prefetch-forward 16 tcp:192.0.2.7:4444
      umemctl migrate --resume --vm vm1
    """
    quiet_qmp()
    vms = {vm} if vm else set()
    if log_format == "json":
        log_to_stderr(log_format, names=vms)
    record = _record_of(vm) if resume else None
    if uri is None and record is None:
        raise click.UsageError("Missing argument 'URI': where to?  tcp:HOST:PORT")
    if precopy_rounds and not postcopy:
        raise UsageError("--precopy-rounds goes with -p; without, rounds end when it is best")
    if no_postcopy and (postcopy or hybrid):
        raise UsageError("--no-postcopy excludes -p and --hybrid")
    if on_demand_only and not (postcopy or hybrid):
        raise UsageError("-n is about post-copy: it goes with -p or --hybrid")
    precopy = None
    if not record and (not postcopy or precopy_rounds):
        precopy = Limits(
            max_downtime_s=max_downtime / 1000,
            max_precopy_s=max_precopy_time,
            rounds=precopy_rounds,
            may_switch=hybrid or postcopy,
        )
    plan = Plan(
        qmp=Path(record.qmp) if record else _qmp_path(qmp, vm),
        destination=record.address if record and not uri else parse(uri or "", listening=False),
        security=security_of(token_file, tls_creds, insecure=insecure, tls_hostname=tls_hostname),
        background=not on_demand_only,
        background_lanes=record.background_lanes if record else lanes,
        max_bandwidth=max_bandwidth,
        release_ram=release_ram,
        precopy=precopy,
        may_switch=not no_postcopy,
        prefetch=Prefetch(prefetch_forward, prefetch_backward),
        compress=Compress(compress),
    )
    plan.security.check_destination(plan.destination)
    offer(plan.compress)  # what cannot be is said at once
    status, report = asyncio.run(_migrate(plan, record, vms))
    if as_json:
        print_json(report.to_json())
    else:
        show_report(report)
    sys.exit(status)


def _qmp_path(qmp: Path | None, vm: str | None) -> Path:
    """Find the VM's QMP socket.  Raises UsageError."""
    if qmp and vm:
        raise UsageError("--qmp and --vm exclude each other")
    if qmp:
        return qmp
    if vm:
        return runtime.qmp_socket(vm)
    found = sorted((runtime.runtime_dir() / "vm").glob("*/qmp.sock"))
    if len(found) != 1:
        names = ", ".join(path.parent.name for path in found) or "none"
        raise UsageError(f"which VM?  Give --vm or --qmp (umem-qemu runs here: {names})")
    return found[0]


def _record_of(vm: str | None) -> CommitRecord:
    """Return the record of the VM that is to be gone on with.  Raises UsageError, CheckError."""
    if vm is None:
        found = names()
        if len(found) != 1:
            raise UsageError(f"which VM?  Give --vm (left this host: {', '.join(found) or 'none'})")
        (vm,) = found
    return CommitRecord.read(vm)


async def _migrate(plan: Plan, record: CommitRecord | None, vms: set[str]) -> tuple[int, Report]:
    """Run it with display, signals and status socket.  The VM's name is added to
    those that the log knows.  Returns the exit status and the report.
    """
    display = LogDisplay(vms) if is_json() else make_display()
    migration = Resumed(plan, record, display.tell) if record else Migration(plan, display.tell)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            continue  # nohup
        name = "Ctrl-C" if number == signal.SIGINT else number.name
        loop.add_signal_handler(number, migration.interrupt, name)
    with display:
        shown = asyncio.create_task(display.follow(migration), name="display")
        told = asyncio.create_task(
            _tell_status(migration, plan.security, vms), name="status socket"
        )
        try:
            await migration.run()
            status = 0
        except UmemError as e:
            display.fail(str(e))
            status = e.exit_status
        finally:
            for task in (shown, told):
                task.cancel()
            await asyncio.gather(shown, told, return_exceptions=True)
            if migration.vm:  # else it has not even found one
                reports.keep(reports.Side.SOURCE, migration.report.to_json())
    return status, migration.report


async def _tell_status(migration: Migration | Resumed, security: Security, vms: set[str]) -> None:
    """Answer `umemctl status` and others as soon as the VM's name is known."""

    async def answer(question: dict[str, Any], _asker: Asker) -> dict[str, Any]:
        match question["command"]:
            case "status":
                return migration.to_json()
            case "background":
                if "on" in question:
                    migration.set_background(bool(question["on"]))
                if "max_bandwidth_bytes_s" in question:
                    migration.set_max_bandwidth(bandwidth(question["max_bandwidth_bytes_s"]))
                return {}
            case "switch":
                migration.switch()
                return {}
            case "recover":
                to = question.get("to")
                address = parse(str(to), listening=False) if to else None
                if address:
                    # May ask a name server.
                    await asyncio.to_thread(security.check_destination, address)
                migration.recover(address)
                return {}
            case unknown:
                raise ControlError(f"unknown command {unknown!r}")

    while not migration.locked:
        await asyncio.sleep(0.05)
    vms.add(migration.vm)
    path = runtime.migrate_dir() / f"{migration.vm}.sock"
    async with ControlServer(path, answer):
        await asyncio.Event().wait()
