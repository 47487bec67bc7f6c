# SPDX-License-Identifier: GPL-2.0-or-later
"""The demonstration behind `make demo`; runs inside the test machine.

Two hosts, a guest that checks its own memory under load, one post-copy
migration between two stock QEMUs, and what came of it.
"""

import contextlib
import json
import os
import pty
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from tests.vm.guest import GuestConsole, GuestError, GuestSpec, Verdict, longest_silence
from tests.vm.hosts import Host, Link, two_hosts

ROOT = Path(__file__).resolve().parents[2]
UMEM_QEMU = str(ROOT / "qemu-hooks" / "umem-qemu")
PORT = 4444
BEAT_MS = 20
DEMAND_ONLY_SECONDS = 20.0
"""How long -n stays without background transfer, which it needs to come to an end."""

console = Console(
    force_terminal=bool(os.environ.get("UMEM_TTY")), width=int(os.environ.get("COLUMNS", "100"))
)


def step(text: str) -> None:
    """Say what happens next."""
    console.print(f"[bold]==>[/bold] {text}", highlight=False)


def mebibytes(text: str) -> int:
    """Return the MiB in a size as QEMU's -m takes it."""
    units = {"M": 1, "G": 1024}
    return int(text[:-1]) * units[text[-1].upper()] if text[-1:].isalpha() else int(text)


@contextlib.contextmanager
def running(host: Host, argv: list[str], log: Path) -> Iterator["subprocess.Popen[Any]"]:
    """Run a program on a host for the time of the block; its output goes to LOG."""
    with log.open("w") as output:
        process = host.popen(argv, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@dataclass
class Migration:
    """A running `umemctl migrate`: its report, and its progress on our terminal."""

    process: "subprocess.Popen[Any]"
    relay: threading.Thread

    def finish(self, timeout: float) -> dict[str, Any]:
        """Wait for the end and return the report; raises click.ClickException without one."""
        try:
            output, _ = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise click.ClickException(f"the migration took more than {timeout:.0f} s") from None
        self.relay.join(timeout=5)
        try:
            report: dict[str, Any] = json.loads(output)
        except ValueError:
            raise click.ClickException("umemctl migrate gave no report") from None
        if self.process.returncode:
            raise click.ClickException(
                f"umemctl migrate exited with {self.process.returncode}: {report.get('error')}"
            )
        return report


def start_migration(source: Host, argv: list[str]) -> Migration:
    """Start umemctl migrate; it sees a terminal on its stderr when we have one."""
    ours, theirs = pty.openpty() if os.environ.get("UMEM_TTY") else os.pipe()
    size = {name: os.environ[name] for name in ("COLUMNS", "LINES", "TERM") if name in os.environ}
    process = source.popen(argv, stdout=subprocess.PIPE, stderr=theirs, env=size)
    os.close(theirs)

    def copy() -> None:
        # A pseudo terminal whose other end was closed gives EIO, not an end.
        with contextlib.suppress(OSError):
            while chunk := os.read(ours, 4096):
                sys.stdout.buffer.write(chunk)
                sys.stdout.buffer.flush()
        os.close(ours)

    relay = threading.Thread(target=copy, daemon=True)
    relay.start()
    return Migration(process, relay)


def show(report: dict[str, Any], verdict: Verdict, silence_s: float, wire_bytes: int) -> None:
    """Print the table."""
    table = Table(show_header=False, title="post-copy migration of a running guest")

    def row(label: str, value: str) -> None:
        table.add_row(label, value)

    def number(name: str, unit: str, digits: int) -> str:
        value = report.get(name)
        return "-" if value is None else f"{value:.{digits}f} {unit}"

    colour = "green" if verdict.ok else "red"
    row(
        "guest's own verdict",
        f"[{colour}]{'ok' if verdict.ok else 'CORRUPT'}[/{colour}], {verdict.bad} bad of "
        f"{verdict.pages} pages, {verdict.rounds} rounds",
    )
    row("downtime, as the QEMUs tell it", number("downtime_ms", "ms", 1))
    row(f"longest silence of the guest ({BEAT_MS} ms beat)", f"{silence_s * 1000:.0f} ms")
    row("time to fully resident", number("time_to_resident_s", "s", 2))
    for kind, label in (("demand", "on demand"), ("background", "in background")):
        row(f"pages {label}", str(report[f"pages_{kind}"]))
    row("zero pages", str(report["pages_zero"]))
    latencies = (number(f"demand_latency_{which}_us", "us", 0) for which in ("p50", "p99", "max"))
    row("demand latency p50 / p99 / max", " / ".join(latencies))
    row("bytes sent", f"{report['bytes_sent'] / 2**20:.1f} MiB")
    row("bytes on the wire, all headers", f"{wire_bytes / 2**20:.1f} MiB")
    row("of RAM", f"{report['ram_bytes'] / 2**20:.0f} MiB")
    console.print(table)


def wait_for(what: str, path: Path, seconds: float = 30.0) -> None:
    """Wait until a file is there; raises click.ClickException when it does not come."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            raise click.ClickException(f"{what}: no {path} within {seconds:.0f} s")
        time.sleep(0.1)


def migrate(spec: GuestSpec, link: Link, flags: tuple[str, ...], logs: Path) -> Verdict:
    """Do it all; returns what the guest says at the end."""
    qemu = os.environ["UMEM_QEMU"]
    slow = 4.0 if spec.accel == "tcg" else 1.0
    with contextlib.ExitStack() as stack:
        step(
            f"two hosts with a link of {link.rate}, {link.delay} each way; "
            f"guest: {spec.memory}, {spec.vcpus} vCPU, {spec.accel}, "
            f"verifier over {spec.mb} MiB"
        )
        source, destination = stack.enter_context(two_hosts(link))
        for host in (source, destination):
            ram = Path("/dev/shm") / f"umem-{host.name}"
            host.extra_env["UMEM_RAM_DIR"] = str(ram)
            # They have one driver, and an area of that name is the destination's.
            host.extra_env["UMEM_RAM"] = "file"
            stack.callback(shutil.rmtree, ram, ignore_errors=True)

        step("source: umem-qemu starts stock QEMU with the guest")
        serial = source.runtime / "serial"
        argv = [UMEM_QEMU, qemu, "-name", "vm1", *spec.qemu_args(serial)]
        stack.enter_context(running(source, argv, logs / "source-qemu.log"))
        at_source = stack.enter_context(GuestConsole(serial))
        at_source.connected(timeout=60)
        at_source.wait("ready", timeout=spec.boot_timeout)
        at_source.wait("verify", timeout=60 * slow)
        at_source.send(f"beat {BEAT_MS}")

        step("destination: umemctl serve --insecure")
        argv = ["umemctl", "serve", "--insecure"]
        stack.enter_context(running(destination, argv, logs / "serve.log"))
        wait_for("umemctl serve", destination.runtime / "serve.sock")

        step(f"destination: umem-qemu ... -postcopy -incoming tcp:0:{PORT}")
        serial = destination.runtime / "serial"
        argv = [UMEM_QEMU, qemu, "-name", "vm1", *spec.qemu_args(serial)]
        argv += ["-postcopy", "-incoming", f"tcp:0:{PORT}"]
        stack.enter_context(running(destination, argv, logs / "destination-qemu.log"))
        at_destination = stack.enter_context(GuestConsole(serial))
        at_destination.connected(timeout=60)

        words = [
            "umemctl",
            "migrate",
            "-p",
            "--insecure",
            *flags,
            f"tcp:{destination.address}:{PORT}",
        ]
        step(f"source: {' '.join(words)}")
        before = source.tx_bytes()
        started = time.monotonic()
        migration = start_migration(source, [*words, "--vm", "vm1", "--json"])
        # The destination's serial line says nothing before the guest runs there.
        first = at_destination.wait("beat", timeout=60 * slow)
        if "-n" in flags:
            step(f"-n: nothing but what the guest touches, for {DEMAND_ONLY_SECONDS:.0f} s")
            time.sleep(DEMAND_ONLY_SECONDS)
            step("source: umemctl background vm1, so that it comes to an end")
            done = source.run(["umemctl", "background", "vm1"])
            if done.returncode:
                raise click.ClickException(done.stderr.strip())
        report = migration.finish(timeout=300 * slow)
        wire_bytes = source.tx_bytes() - before
        silence = longest_silence(at_source, at_destination, start=started, end=first.time + 1.0)

        step("the guest checks every page of its memory")
        verdict = at_destination.verdict(timeout=120 * slow)
        show(report, verdict, silence, wire_bytes)
        return verdict


@click.command()
@click.option("--accel", type=click.Choice(["kvm", "tcg"]), default="kvm")
@click.option("--guest-mem", default="256M")
@click.option("--vcpus", default=1)
@click.option("--rate", default="1gbit")
@click.option("--delay", default="0.2ms")
@click.option("--flags", default="", help="More flags of umemctl migrate, such as -n.")
def main(accel: str, guest_mem: str, vcpus: int, rate: str, delay: str, flags: str) -> None:
    """Migrate a running guest and show what came of it; non-zero when its memory is not sound."""
    if accel == "kvm" and not Path("/dev/kvm").exists():
        step("no /dev/kvm in this machine (no nested virtualisation): using tcg")
        accel = "tcg"
    size = mebibytes(guest_mem)
    spec = GuestSpec(
        workload="verify",
        writers=vcpus,
        mb=max(8, size // 2 - 32),
        memory=guest_mem,
        vcpus=vcpus,
        accel=accel,
    )
    logs = Path(os.environ["UMEM_BUILD"]) / "vm" / "demo"
    logs.mkdir(parents=True, exist_ok=True)
    try:
        verdict = migrate(spec, Link(rate=rate, delay=delay), tuple(flags.split()), logs)
    except (GuestError, click.ClickException) as error:
        for log in sorted(logs.glob("*.log")):
            console.print(f"--- {log}", highlight=False, markup=False)
            tail = log.read_text(errors="replace").splitlines()[-15:]
            console.print("\n".join(tail), highlight=False, markup=False)
        raise click.ClickException(str(error)) from None
    if not verdict.ok:
        raise click.ClickException(f"the guest's memory is not sound: {verdict.text}")
    step("done: the guest runs at the destination, and its memory is its own")


if __name__ == "__main__":
    main(prog_name="python -m tests.vm.demo")
