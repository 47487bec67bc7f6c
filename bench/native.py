# SPDX-License-Identifier: GPL-2.0-or-later
"""What a page costs in our own code, on the processors of this machine: the lanes as they are, over
TCP on loopback, with no driver, no QEMU and no emulation.

    make bench-native

A pipe stands for the driver's queue of requests, another for the wake: the consumer writes the page
that it misses, and sleeps until it is marked; then the background lane moves all memory.  Beside
it, taking turns, the least that the same can cost: bench/migration/rawtcp.c, 16 bytes there and
4 KiB back, and a stream; and with --qemu what it costs QEMU's own post-copy
(bench/native_qemu.py).  What a link adds to a request, it adds to all; how fast it is limits all.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import random
import socket
import statistics
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click

from bench.environment import here
from bench.fault.run import GCC
from bench.lanes import Children
from bench.migration.results import Limit
from bench.native_qemu import Figures, Peer
from pyumem.claims import ClaimMap, Slots
from pyumem.lanes import destination_background, link, source_background, source_urgent
from pyumem.lanes.destination_urgent import UrgentLane
from pyumem.lanes.fill import Arrivals, Filler
from pyumem.stats import StatsBlock
from pyumem.worker import Channel, hurry
from tests.vm.harness import BUILD

PAGE = mmap.PAGESIZE
ROOT = Path(__file__).parents[1]
_RECORD = struct.Struct("=QQ")
_WAKE = struct.Struct("=Q")
"""How many pages were marked."""


class PipeArea:
    """An area (pyumem.lanes.fill.AreaLike) whose driver is two pipes."""

    name = "ram0"
    granule_pages = 1

    def __init__(self, npages: int) -> None:
        """Of so many pages, all missing."""
        self.npages = npages
        self.shmem_fd = os.memfd_create(self.name)
        os.ftruncate(self.shmem_fd, npages * PAGE)
        self._asked, self.ask = os.pipe()
        self.woken, self.wake = os.pipe()
        self._records = memoryview(bytearray(64 * _RECORD.size))

    def fileno(self) -> int:
        """Readable while a request is pending."""
        return self._asked

    def write(self, pgoff: int, data: memoryview) -> None:
        """Write to the backing file."""
        os.pwrite(self.shmem_fd, data, pgoff * PAGE)

    def requests(self) -> memoryview:
        """Read what is pending."""
        nr_bytes = os.readv(self._asked, [self._records])
        return self._records[:nr_bytes].cast("Q")

    def close(self) -> None:
        """Close what the parent has of it."""
        for fd in (self.shmem_fd, self._asked, self.ask, self.woken):
            os.close(fd)

    def open_requests(self) -> list[int]:
        """Return nothing: no lane is lost here."""
        return []

    def mark(self, ranges: Iterable[tuple[int, int]], *, touch: bool = False) -> int:  # noqa: ARG002
        """Wake the consumer."""
        count = sum(count for _, count in ranges)
        os.write(self.wake, _WAKE.pack(count))
        return count

    def woken_for(self) -> int:
        """Sleep until pages are marked; return how many."""
        record = os.read(self.woken, _WAKE.size)
        if len(record) < _WAKE.size:
            raise click.ClickException("a lane has ended before its time")
        return int(_WAKE.unpack(record)[0])


def serve(channel: Channel, message: dict[str, Any], fds: list[int]) -> None:
    """Be the destination's lane, as the body() of its module sets it up."""
    area: PipeArea = message["area"]
    stats = StatsBlock.attach(fds[1])
    if message["urgent"]:
        hurry()
    channel.send({"event": "ready"})
    arrivals = Arrivals.attach(Slots([area.npages]), fds[2:4])
    if not channel.wait_go():
        return
    lane = link.Link(socket.socket(fileno=fds[0]), "peer", stats)
    if message["urgent"]:
        UrgentLane(channel, lane, [area], arrivals, stats, untouched=True).run()
    else:
        destination_background.serve(lane, Filler(lane, [area], arrivals, stats, untouched=True))
        channel.receive()


@contextlib.contextmanager
def lane(npages: int, ram: int, *, urgent: bool) -> Iterator[PipeArea]:
    """One lane, its two ends in processes of their own."""
    with contextlib.ExitStack() as stack:
        slots = Slots([npages])
        claims, arrivals, area = ClaimMap.create(slots), Arrivals.create(slots), PipeArea(npages)
        stack.callback(area.close)
        stack.callback(claims.close)
        stack.callback(arrivals.close)
        children = Children()
        stack.callback(children.end)
        with socket.create_server(("127.0.0.1", 0)) as server:
            one = stack.enter_context(socket.create_connection(server.getsockname()))
            other = stack.enter_context(server.accept()[0])
        link.tune(one, urgent=urgent, background=not urgent)
        link.tune(other, urgent=urgent)
        stats = [StatsBlock.create(side) for side in ("destination", "source")]
        for block in stats:
            stack.callback(block.close)
        fds = [other.fileno(), stats[0].memory.fd, *arrivals.fds]
        children.start(serve, {"area": area, "urgent": urgent}, fds)
        os.close(area.wake)  # only the lane has it: its end is an end of file
        message = {
            "peer": "peer",
            "index": 0,
            "background_lanes": 1,
            "tls": None,
            "compression": None,
            "areas": [{"id": "ram0", "size_bytes": npages * PAGE}],
            "prefetch": {"forward": 0, "backward": 0},
        }
        fds = [one.fileno(), stats[1].memory.fd, claims.memory.fd, ram]
        children.start((source_urgent if urgent else source_background).body, message, fds)
        children.go()
        yield area


def ask(area: PipeArea, nr_requests: int, seed: int) -> list[float]:
    """Miss pages at random, one after the other; return how long each took, in microseconds."""
    pages = random.Random(seed).sample(range(area.npages), nr_requests)
    took = []
    for page in pages:
        record = _RECORD.pack(page, 0)
        began = time.perf_counter_ns()
        os.write(area.ask, record)
        area.woken_for()
        took.append((time.perf_counter_ns() - began) / 1000)
    return took


def stream(area: PipeArea) -> float:
    """Wait until all memory is there; return how fast that was, in MiB/s."""
    began = time.monotonic()
    missing = area.npages
    while missing:
        missing -= area.woken_for()
    return area.npages * PAGE / (time.monotonic() - began) / (1 << 20)


@dataclass(frozen=True)
class Lanes(Limit):
    """What a round found, in the form of its limit, and of QEMU's."""

    request_mean_us: float


def figures(took: list[float], stream_mib_s: float) -> Lanes:
    """Return what a round found."""
    took = sorted(took)
    mean = statistics.fmean(took)
    return Lanes(took[len(took) // 2], took[len(took) * 99 // 100], stream_mib_s, mean)


def build(directory: Path) -> Path:
    """Compile the limit."""
    program = directory / "rawtcp"
    source = ROOT / "bench/migration/rawtcp.c"
    subprocess.run([*GCC, source, "-o", program], check=True)
    return program


def raw(program: Path, nr_requests: int, mib: int) -> Limit:
    """Measure the limit."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    argv = [str(program), "serve", "127.0.0.1", port]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL) as server:
        try:
            argv = [str(program), "ask", "127.0.0.1", port, str(nr_requests), str(mib)]
            deadline = time.monotonic() + 10
            while True:
                done = subprocess.run(argv, capture_output=True, text=True, check=False)
                if not done.returncode:
                    return Limit(**json.loads(done.stdout))
                if time.monotonic() > deadline:
                    raise click.ClickException(done.stderr)
                time.sleep(0.05)
        finally:
            server.kill()


@click.command()
@click.option("--requests", "nr_requests", default=3000, help="In each round.")
@click.option("--mib", default=512, help="Memory to stream.")
@click.option("--rounds", default=7)
@click.option("--link-us", default=400.0, help="A round trip on the link that is thought of.")
@click.option("--link-gbit", default=1.0, help="And how fast it is.")
@click.option(
    "--qemu", type=click.Path(path_type=Path), help="A QEMU, whose post-copy is measured, too."
)
@click.option("--json", "as_json", is_flag=True)
@click.option(
    "--save", type=click.Path(path_type=Path), help="Write FILE.json, and FILE.rst.inc for Sphinx."
)
def main(
    nr_requests: int,
    mib: int,
    rounds: int,
    link_us: float,
    link_gbit: float,
    qemu: Path | None,
    as_json: bool,
    save: Path | None,
) -> None:
    """Measure, and say what the ratios are on such a link.

    Medians of the rounds, and of the rounds' ratios.
    """
    npages = mib * (1 << 20) // PAGE
    ours, limits, peers = [], [], []
    with (
        tempfile.TemporaryDirectory() as scratch,
        tempfile.NamedTemporaryFile(dir="/dev/shm") as ram,
    ):
        program = build(Path(scratch))
        peer = Peer(qemu, BUILD, Path(scratch)) if qemu else None
        for _ in range(mib):
            ram.write(os.urandom(1 << 20))
        ram.flush()
        for seed in range(rounds):
            limits.append(raw(program, nr_requests, mib))
            with lane(npages, ram.fileno(), urgent=True) as area:
                took = ask(area, nr_requests, seed)
            with lane(npages, ram.fileno(), urgent=False) as area:
                ours.append(figures(took, stream(area)))
            if peer:
                peers.append(peer.measure(Path(ram.name), nr_requests))
    told = {
        "environment": {**here(rounds), "requests": nr_requests, "mib": mib},
        "link": {"round_trip_us": link_us, "gbit_s": link_gbit},
        "lanes": _medians(ours),
        "raw_tcp": _medians(limits),
        "ratio_on_link": on_link(ours, limits, link_us, link_gbit),
    }
    if peers:
        told["qemu_postcopy"] = _medians(peers)
        told["ratio_to_qemu"] = to_qemu(ours, peers, link_us)
    if save:
        save.with_suffix(".json").write_text(json.dumps(told, indent=2) + "\n")
        save.with_suffix(".rst.inc").write_text(rst(told))
    click.echo(json.dumps(told, indent=2) if as_json else text(told))


def on_link(
    ours: Sequence[Limit], limits: list[Limit], link_us: float, link_gbit: float
) -> dict[str, float]:
    """Return lanes divided by raw TCP, the link's own part added to both."""
    most = link_gbit * 1e9 / 8 / (1 << 20)
    ratios: dict[str, list[float]] = {each.name: [] for each in fields(Limit)}
    for a, b in zip(ours, limits, strict=True):
        ratios["request_p50_us"].append((a.request_p50_us + link_us) / (b.request_p50_us + link_us))
        ratios["request_p99_us"].append((a.request_p99_us + link_us) / (b.request_p99_us + link_us))
        ratios["stream_mib_s"].append(min(a.stream_mib_s, most) / min(b.stream_mib_s, most))
    return {name: round(statistics.median(found), 2) for name, found in ratios.items()}


def to_qemu(ours: list[Lanes], peers: list[Figures], link_us: float) -> dict[str, float]:
    """Return lanes divided by QEMU; of a request on the link, of the stream without one."""
    pairs = list(zip(ours, peers, strict=True))
    request = [(a.request_mean_us + link_us) / (b.request_mean_us + link_us) for a, b in pairs]
    ratios = {
        "request_mean_us": request,
        "stream_mib_s": [a.stream_mib_s / b.stream_mib_s for a, b in pairs],
    }
    return {name: round(statistics.median(found), 2) for name, found in ratios.items()}


def text(told: dict[str, Any]) -> str:
    """Return it for a terminal."""
    link = told["link"]
    lines = [f"{'':15} {'lanes':>9} {'raw TCP':>9} {'ratio, on the link':>19}"]
    lines += [
        f"{name:15} {told['lanes'][name]:9.1f} {told['raw_tcp'][name]:9.1f} {ratio:19.2f}"
        for name, ratio in told["ratio_on_link"].items()
    ]
    if peer := told.get("qemu_postcopy"):
        lines += [
            f"{name:15} {told['lanes'][name]:9.1f} {peer[name]:9.1f} {ratio:19.2f}  of QEMU's"
            for name, ratio in told["ratio_to_qemu"].items()
        ]
    lines += [f"the link: {link['gbit_s']:g} Gbit/s, {link['round_trip_us']:g} us there and back"]
    return "\n".join(lines)


def rst(told: dict[str, Any]) -> str:
    """Return it for Documentation/."""
    link, where = told["link"], told["environment"]
    head = (
        ".. SPDX-License-Identifier: GPL-2.0-or-later\n"
        ".. Written by python -m bench.native --save.\n\n"
        f"``python -m bench.native``, commit {where['commit']}, kernel {where['host_kernel']}, "
        f"{where['host_cpus']} processors, load {where['host_load']:.1f}; medians of "
        f"{where['rounds']} rounds of {where['requests']} requests and {where['mib']} MiB.  The "
        f"last column is what the ratio is on a link of {link['gbit_s']:g} Gbit/s with "
        f"{link['round_trip_us']:g} us there and back, whose own part is the same for both.\n\n"
        ".. list-table::\n   :header-rows: 1\n\n"
        "   * - \n     - lanes\n     - raw TCP\n     - ratio on the link\n"
    )
    rows = {
        "request_p50_us": "request, median, us",
        "request_p99_us": "request, 99 %, us",
        "stream_mib_s": "stream, MiB/s",
    }
    table = head + "".join(
        f"   * - {label}\n     - {told['lanes'][name]}\n     - {told['raw_tcp'][name]}\n"
        f"     - x {told['ratio_on_link'][name]:.2f}\n"
        for name, label in rows.items()
    )
    if peer := told.get("qemu_postcopy"):
        ratio = told["ratio_to_qemu"]
        table += (
            "\nAnd against QEMU's own post-copy, in the same rounds; of a request on that link, of "
            "the stream without one:\n\n"
            ".. list-table::\n   :header-rows: 1\n\n"
            "   * - \n     - lanes\n     - QEMU\n     - ratio\n"
            "   * - request, mean, us\n"
            f"     - {told['lanes']['request_mean_us']}\n     - {peer['request_mean_us']}\n"
            f"     - x {ratio['request_mean_us']:.2f}\n"
            "   * - stream, MiB/s\n"
            f"     - {told['lanes']['stream_mib_s']}\n     - {peer['stream_mib_s']}\n"
            f"     - x {ratio['stream_mib_s']:.2f}\n"
        )
    return table


def _medians(found: Sequence[Limit | Figures]) -> dict[str, float]:
    return {
        each.name: round(statistics.median(getattr(one, each.name) for one in found), 1)
        for each in fields(found[0])
    }


if __name__ == "__main__":
    main(prog_name="python -m bench.native")
