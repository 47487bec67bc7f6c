# SPDX-License-Identifier: GPL-2.0-or-later
"""What the lanes' constants and options are worth: the lanes' own processes, the driver, a link of
netem between two network namespaces, no QEMU.  Runs inside the test machine:

    make vm CMD='python -m bench.lanes --rate 1gbit --delay 0.2ms --case run=64 --case run=16'

Each case moves the same memory once a round, while a consumer touches pages at random; the cases
of a round take turns, so that what disturbs one disturbs all, and each is told as a ratio to the
first one.  The latency is the one that a report has: from reading a request to marking its page.
"""

import ctypes
import mmap
import os
import random
import select
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from pyumem.area import Area
from pyumem.claims import ClaimMap, Slots
from pyumem.compression import directory
from pyumem.lanes import (
    destination_background,
    destination_urgent,
    link,
    serve_pages,
    source_background,
    source_urgent,
    window,
)
from pyumem.lanes.fill import Arrivals
from pyumem.report import totals_of
from pyumem.stats import StatsBlock
from pyumem.worker import Channel
from tests.vm.hosts import Host, Link, two_hosts

PAGE = mmap.PAGESIZE
_CLONE_NEWNET = 0x40000000
_BOUNDS = (window.LEAST, window.FIRST, window.MOST)
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Case:
    """What is tried."""

    text: str
    run: int = serve_pages.RUN_PAGES
    """Pages."""
    window: int = 0
    """KiB; 0: what it finds to be right."""
    lowat: int = link.BACKGROUND_LOWAT // 1024
    """KiB."""
    lanes: int = 1
    compress: str = "off"

    @classmethod
    def parse(cls, text: str) -> "Case":
        """Read `run=16,window=64`."""
        words: dict[str, Any] = dict(word.split("=") for word in text.split(","))
        numbers = {name: int(value) for name, value in words.items() if name != "compress"}
        return cls(text, **{**words, **numbers})


@contextmanager
def within(host: Host) -> Iterator[None]:
    """Make sockets in a host's network namespace."""
    with (
        Path("/proc/thread-self/ns/net").open("rb") as home,
        Path(f"/run/netns/{host.namespace}").open("rb") as there,
    ):
        if _libc.setns(there.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), host.namespace)
        try:
            yield
        finally:
            _libc.setns(home.fileno(), _CLONE_NEWNET)


def connect(source: Host, destination: Host) -> tuple[socket.socket, socket.socket]:
    """Return the two ends of a connection."""
    with within(destination):
        server = socket.create_server((destination.address, 0))
    with server:
        with within(source):
            one = socket.create_connection(server.getsockname())
        other, _ = server.accept()
    return one, other


class Children:
    """Processes of a round."""

    def __init__(self) -> None:
        """Begin with none."""
        self.pids: list[int] = []
        self.channels: list[Channel] = []

    def start(self, body: Callable[..., None], message: dict[str, Any], fds: list[int]) -> None:
        """Run a lane's body in a process of its own."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        fds = [os.dup(fd) for fd in fds]
        if not (pid := os.fork()):
            ours.close()
            for channel in self.channels:
                channel.close()
            try:
                body(Channel(theirs), message, fds)
            finally:
                os._exit(0)
        theirs.close()
        for fd in fds:
            os.close(fd)
        self.pids.append(pid)
        self.channels.append(Channel(ours))
        self.channels[-1].receive()  # ready

    def go(self) -> None:
        """Let all begin."""
        for channel in self.channels:
            channel.send({"command": "go"})

    def check(self) -> None:
        """Raise ClickException when one has ended by itself: it is to wait for its end."""
        for pid in self.pids:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                raise click.ClickException("a lane has ended before its time")

    def end(self) -> None:
        """End all."""
        for channel in self.channels:
            channel.close()
        for pid in self.pids:
            os.kill(pid, 9)
            os.waitpid(pid, 0)


def touch(area: Area, every_s: float, seed: int) -> None:
    """Be the consumer: touch pages at random."""
    chooser = random.Random(seed)
    with Path(area.node).open("r+b", buffering=0) as node:
        memory = mmap.mmap(node.fileno(), area.npages * PAGE)
        while True:
            assert memory[chooser.randrange(area.npages) * PAGE] >= 0
            time.sleep(every_s)


def measure(
    case: Case, hosts: tuple[Host, Host], ram: int, size: int, every_s: float, seed: int
) -> dict[str, float]:
    """Move the memory once."""
    for module in (serve_pages, source_background):
        vars(module)["RUN_PAGES"] = case.run
    vars(link)["BACKGROUND_LOWAT"] = case.lowat * 1024
    bounds = (case.window * 1024,) * 3 if case.window else _BOUNDS
    vars(window).update(zip(("LEAST", "FIRST", "MOST"), bounds, strict=True))
    with ExitStack() as stack:
        area = Area.create(f"bench.{seed}", size)
        stack.callback(area.close)
        slots = Slots([area.npages])
        claims, arrivals = ClaimMap.create(slots), Arrivals.create(slots)
        stack.callback(claims.close)
        stack.callback(arrivals.close)
        children = Children()
        stack.callback(children.end)
        blocks: dict[str, list[StatsBlock]] = {"source": [], "destination": []}
        for index in range(-1, case.lanes):
            urgent = index < 0
            one, other = connect(*hosts)
            stats = {side: StatsBlock.create(side) for side in blocks}
            for side, block in stats.items():
                blocks[side].append(block)
            compress = case.compress != "off" and not urgent
            message: dict[str, Any] = {
                "peer": "peer",
                "index": index,
                "background_lanes": case.lanes,
                "tls": None,
                "touch": False,
                "resumed": False,
                "untouched": True,
                "qemu_pid": os.getpid(),
                "areas": [{"id": "ram0", "size_bytes": size}],
                "prefetch": {"forward": 0, "backward": 0},
                "compression": directory() if compress else "",
            }
            with other:
                link.tune(other, urgent=urgent)
                children.start(
                    destination_urgent.body if urgent else destination_background.body,
                    message,
                    [
                        *(other.fileno(), stats["destination"].memory.fd, *arrivals.fds),
                        *(area.server_fd, area.shmem_fd),
                    ],
                )
            wish = {"directory": directory(), "wish": case.compress}
            with one:
                link.tune(one, urgent=urgent, background=not urgent)
                children.start(
                    source_urgent.body if urgent else source_background.body,
                    {**message, "compression": wish if compress else None},
                    [one.fileno(), stats["source"].memory.fd, claims.memory.fd, ram],
                )
        before = hosts[0].tx_bytes()
        began = time.monotonic()
        children.go()
        if not (pid := os.fork()):
            try:
                touch(area, every_s, seed)
            finally:
                os._exit(0)
        try:
            while not area.info().complete:
                children.check()
                select.select([], [], [], 0.01)
            seconds = time.monotonic() - began
        finally:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
        told = totals_of(block.read() for block in blocks["destination"])
        return {
            "p50_us": told.percentile_us(0.5) or 0,
            "p99_us": told.percentile_us(0.99) or 0,
            "MiB_s": size / seconds / (1 << 20),
            "wire_MiB": (hosts[0].tx_bytes() - before) / (1 << 20),
            "requests": told.requests,
        }


def content(kind: str, size: int) -> bytes:
    """Return memory that does not shrink, or shrinks as a guest's does."""
    if kind == "random":
        return os.urandom(size)
    parts, have = [], 0
    for path in sorted(Path("/usr/bin").iterdir()):
        if have >= size:
            break
        if path.is_file() and not path.is_symlink():
            parts.append(path.read_bytes())
            have += len(parts[-1])
    return b"".join(parts)[:size]


@click.command()
@click.option("--rate", default="1gbit")
@click.option("--delay", default="0.2ms")
@click.option("--mib", default=48, help="Memory to move.")
@click.option("--rounds", default=5)
@click.option("--touch-ms", default=10.0, help="Milliseconds between two touches.")
@click.option("--content", "kind", type=click.Choice(["random", "programs"]), default="random")
@click.option(
    "--case", "cases", multiple=True, required=True, help="run=,window=,lowat=,lanes=,compress="
)
def main(
    rate: str, delay: str, mib: int, rounds: int, touch_ms: float, kind: str, cases: tuple[str, ...]
) -> None:
    """Measure the cases and print medians, and ratios to the first case."""
    size = mib << 20
    wanted = [Case.parse(text) for text in cases]
    found: dict[str, list[dict[str, float]]] = {case.text: [] for case in wanted}
    shape = Link(rate=None if rate == "none" else rate, delay=None if delay == "none" else delay)
    with two_hosts(shape) as hosts, tempfile.TemporaryFile(dir="/dev/shm") as ram:
        ram.write(content(kind, size))
        ram.truncate(size)
        ram.flush()
        for number in range(rounds):
            for index, case in enumerate(wanted):
                seed = 100 * number + index
                result = measure(case, hosts, ram.fileno(), size, touch_ms / 1000, seed)
                found[case.text].append(result)
    click.echo(f"{rate} {delay} {mib} MiB {kind}, {rounds} rounds, medians (ratio to the first)")
    first: dict[str, float] = {}
    for text, results in found.items():
        medians = {name: statistics.median(r[name] for r in results) for name in results[0]}
        first = first or medians
        click.echo(
            f"{text:34}  "
            + "  ".join(
                f"{name} {value:.0f} ({value / (first[name] or 1):.2f})"
                for name, value in medians.items()
            )
        )


if __name__ == "__main__":
    main(prog_name="python -m bench.lanes")
