# SPDX-License-Identifier: GPL-2.0-or-later
"""The whole way of a page over loopback, source lanes to destination lanes, with areas that need no
driver.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pyumem import wire
from pyumem.claims import UNPACED, ClaimMap, Slots
from pyumem.compression import directory
from pyumem.errors import DriverError, LinkError, ProtocolError, UmemError
from pyumem.lanes import (
    destination_background,
    destination_urgent,
    fill,
    source_background,
    source_urgent,
)
from pyumem.lanes.compress import Packer, Unpacker
from pyumem.lanes.fill import Arrivals, Filler
from pyumem.lanes.link import Link, tune
from pyumem.lanes.payoff import Always, Decision
from pyumem.lanes.prefetch import NO_PREFETCH, Prefetch
from pyumem.lanes.tls_link import TlsLink
from pyumem.ram import RamFile
from pyumem.shm import SharedMemory
from pyumem.stats import StatsBlock
from pyumem.tls import LaneTls
from pyumem.wire import Kind
from pyumem.worker import Channel
from tests import certificates
from tests.unit.fakes import DISCARDED, PAGE, FakeArea


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        other, _ = server.accept()
    return one, other


def channel_pair() -> tuple[Channel, Channel]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return Channel(ours), Channel(theirs)


def tls_ends(directory: Path) -> tuple[LaneTls, LaneTls]:
    """What source and destination know for a lane's handshake."""
    return (
        LaneTls(directory, False, "localhost", certificates.fingerprint(directory, "server")),
        LaneTls(directory, True, "", certificates.fingerprint(directory, "client")),
    )


class Lane:
    """A lane's body in a thread, and its parent's end."""

    def __init__(self, body: Callable[[Channel], None]) -> None:
        self.parent, child = channel_pair()
        self.error: UmemError | None = None

        def run() -> None:
            try:
                body(child)
            except UmemError as e:
                self.error = e
            finally:
                child.close()

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def go(self) -> None:
        self.parent.send({"command": "go"})

    def ended(self, timeout: float = 10.0) -> UmemError | None:
        self.thread.join(timeout)
        assert not self.thread.is_alive(), "the lane did not end"
        return self.error

    def stop(self) -> None:
        self.parent.close()
        self.thread.join(10)


class World:
    """Both sides.  Sizes are in pages."""

    def __init__(
        self,
        tmp: Path,
        sizes: tuple[int, ...] = (300, 100),
        lanes: int = 1,
        tls: Path | None = None,
        granule_pages: int = 1,
    ) -> None:
        self.tls = tls
        self.slots = Slots(sizes)
        self.sizes = sizes
        self.paths = [tmp / f"ram{n}" for n in range(len(sizes))]
        for path, size in zip(self.paths, sizes, strict=True):
            with path.open("wb") as file:
                file.truncate(size * PAGE)
        self.areas = [FakeArea(f"vm.ram{n}", size, granule_pages) for n, size in enumerate(sizes)]
        self.claims = ClaimMap.create(self.slots)
        self.arrivals = Arrivals.create(self.slots)
        self.stats = {
            name: StatsBlock.create(name)
            for name in ("su", "du", *(f"{s}b{n}" for s in "sd" for n in range(lanes)))
        }
        self.nr_lanes = lanes
        self.lanes: list[Lane] = []
        self.links: list[Link] = []

    def write(self, area: int, pgoff: int, data: bytes) -> None:
        fd = os.open(self.paths[area], os.O_WRONLY)
        os.pwrite(fd, data, pgoff * PAGE)
        os.close(fd)

    def fill(self, area: int, pages: range, seed: int = 1) -> None:
        chooser = random.Random(seed)
        for page in pages:
            self.write(area, page, chooser.randbytes(PAGE))

    def _ram(self) -> list[RamFile]:
        return [
            RamFile.open(str(path), f"ram{n}", size * PAGE)
            for n, (path, size) in enumerate(zip(self.paths, self.sizes, strict=True))
        ]

    def _claims(self) -> ClaimMap:
        return ClaimMap.attach(os.dup(self.claims.memory.fd), self.slots)

    def _arrivals(self) -> Arrivals:
        return Arrivals.attach(self.slots, [os.dup(fd) for fd in self.arrivals.fds])

    def _link(self, name: str, sock: socket.socket) -> Link:
        link = Link(sock, f"peer-{name}", self.stats[name])
        self.links.append(link)
        return link

    def _links(self, source: str, destination: str, *, background: bool = False) -> list[Link]:
        """A connection's two ends; under TLS, where there is some, after the handshake."""
        one, other = tcp_pair()
        if background:
            tune(one, background=True)
        if self.tls is None:
            return [self._link(source, one), self._link(destination, other)]
        with ThreadPoolExecutor(2) as pool:
            ends = [
                pool.submit(TlsLink, sock, f"peer-{name}", self.stats[name], lane)
                for sock, name, lane in zip(
                    (one, other), (source, destination), tls_ends(self.tls), strict=True
                )
            ]
            links: list[Link] = [end.result(20) for end in ends]
        self.links += links
        return links

    def start_urgent(
        self, prefetch: Prefetch = NO_PREFETCH, *, resumed: bool = False
    ) -> tuple[Lane, Lane]:
        source, destination = self._links("su", "du")
        src = Lane(
            lambda channel: source_urgent.UrgentLane(
                channel,
                source,
                self._ram(),
                self._claims(),
                self.stats["su"],
                prefetch=prefetch,
            ).run()
        )
        dst = Lane(
            lambda channel: destination_urgent.UrgentLane(
                channel,
                destination,
                self.areas,
                self._arrivals(),
                self.stats["du"],
                resumed=resumed,
            ).run()
        )
        self.lanes += [src, dst]
        return src, dst

    def start_background(
        self, index: int = 0, decision: Decision | None = None
    ) -> tuple[Lane, Lane]:
        source, destination = self._links(f"sb{index}", f"db{index}", background=True)
        src = Lane(
            lambda channel: source_background.BackgroundLane(
                channel,
                source,
                self._ram(),
                self._claims(),
                self.stats[f"sb{index}"],
                Packer(directory(), decision, self.stats[f"sb{index}"]) if decision else None,
                index=index,
                lanes=index + 1,
            ).run()
        )
        filler = Filler(
            destination,
            self.areas,
            self._arrivals(),
            self.stats[f"db{index}"],
            unpack=Unpacker(directory()).unpack if decision else None,
        )
        dst = Lane(lambda _: destination_background.serve(destination, filler))
        self.lanes += [src, dst]
        return src, dst

    def check(self) -> None:
        """Every page came once, with the right content, and was not touched after its mark."""
        for index, area in enumerate(self.areas):
            assert all(area.cached)
            with self.paths[index].open("rb") as file:
                for page in range(area.npages):
                    assert area.page(page) == file.read(PAGE), f"area {index} page {page}"
            marked = [page for pgoff, nr in area.marks for page in range(pgoff, pgoff + nr)]
            assert sorted(marked) == list(range(area.npages)), "each page is marked once"

    def total(self, side: str) -> Any:  # noqa: ANN401
        blocks = [block.read() for name, block in self.stats.items() if name.startswith(side)]
        total = blocks[0]
        for block in blocks[1:]:
            total = total + block
        return total

    def close(self) -> None:
        for lane in self.lanes:
            lane.parent.close()
        for link in self.links:
            link.hang_up()  # the thread may be about to ask for its number
        for lane in self.lanes:
            lane.thread.join(10)
            assert not lane.thread.is_alive()
        for link in self.links:
            link.close()


@pytest.fixture
def shm() -> Iterator[Path]:
    """A directory on tmpfs, where holes are what they are for guests."""
    import shutil
    import tempfile

    path = Path(tempfile.mkdtemp(dir="/dev/shm"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(params=["clear", "tls"])
def world(
    request: pytest.FixtureRequest, shm: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    tls = certificates.for_localhost(tmp_path_factory) if request.param == "tls" else None
    world = World(shm, tls=tls)
    yield world
    world.close()


def test_a_request_brings_its_page(world: World) -> None:
    world.fill(0, range(10))
    src, _ = world.start_urgent()
    src.go()
    world.areas[0].touch(7)
    world.areas[0].wait_cached(7)
    assert sum(world.areas[0].cached) == 1
    time.sleep(0.05)
    totals = world.total("du")
    assert (totals.pages, totals.requests, totals.latency_count) == (1, 1, 1)
    assert 0 < totals.percentile_us(0.5) <= totals.max_us
    with world.paths[0].open("rb") as file:
        file.seek(7 * PAGE)
        assert world.areas[0].page(7) == file.read(PAGE)


def test_neighbours_of_a_requested_page_follow_it(world: World) -> None:
    world.fill(0, range(150))
    src, _ = world.start_urgent(Prefetch(forward=40, backward=3))
    src.go()
    area = world.areas[0]
    area.touch(100)
    for page in (140, 97):
        area.wait_cached(page)
    time.sleep(0.05)
    assert [page for page in range(area.npages) if area.cached[page]] == list(range(97, 141))
    assert area.marks[0] == (100, 1), "what was asked for came first"
    assert world.total("su").prefetched == 43
    # Nothing twice: what came is not free any more.
    area.touch(145)
    area.wait_cached(145)
    marked = [page for pgoff, nr in area.marks for page in range(pgoff, pgoff + nr)]
    assert len(marked) == len(set(marked))


def test_a_request_overtakes_neighbours(shm: Path) -> None:
    world = World(shm, sizes=(9000,))
    world.fill(0, range(9000))
    src, _ = world.start_urgent(Prefetch(forward=4096))
    src.go()
    area = world.areas[0]
    area.touch(10)
    area.wait_cached(20)
    area.touch(8900)
    area.wait_cached(8900)
    assert not all(area.cached[11:4107])
    area.wait_cached(4106)
    time.sleep(0.1)
    world.close()


def test_nothing_is_read_before_the_vm_has_stopped(world: World) -> None:
    world.fill(0, range(10))
    src, _ = world.start_urgent()
    world.areas[0].touch(3)
    time.sleep(0.2)
    assert not any(world.areas[0].cached)
    world.fill(0, range(10), seed=2)  # the VM still runs
    src.go()
    world.areas[0].wait_cached(3)
    with world.paths[0].open("rb") as file:
        file.seek(3 * PAGE)
        assert world.areas[0].page(3) == file.read(PAGE)


@pytest.mark.parametrize(("lanes", "granule"), [(1, 1), (3, 1), (1, 16), (3, 16), (3, 512)])
def test_everything_comes_once(shm: Path, lanes: int, granule: int) -> None:
    """Granules of the destination may be larger than pages: all of one is marked at once."""
    sizes = (2000, 333) if granule == 1 else (2048, 512)
    world = World(shm, sizes, lanes, granule_pages=granule)
    world.fill(0, range(1200))
    world.fill(0, range(1500, 1600))
    world.fill(1, range(333), seed=5)
    for page in range(100, 400, 3):
        world.write(0, page, bytes(PAGE))  # data, but zero
    urgent, _ = world.start_urgent()
    background = [world.start_background(n) for n in range(lanes)]
    urgent.go()
    for src, _ in background:
        src.go()
    chooser = random.Random(7)
    for _ in range(600):
        which = chooser.randrange(2)
        world.areas[which].touch(chooser.randrange(world.sizes[which]))
    for area in world.areas:
        area.wait_complete()
    for _, dst in background:
        assert dst.ended() is None  # END was said
    world.check()
    time.sleep(0.1)
    source, destination = world.total("s"), world.total("d")
    assert source.pages == destination.pages == 1200 - 100 + 100 + 333
    assert source.zero_pages == destination.zero_pages == sum(sizes) - source.pages
    assert destination.marked == sum(sizes)
    world.close()


def test_compressed_pages_arrive_as_they_were(world: World) -> None:
    world.fill(0, range(100, 200))  # random: what does not shrink goes as it is
    for page in range(100):
        world.write(0, page, (b"%d of some text that has been seen before\n" % page) * 80)
    urgent, _ = world.start_urgent()
    _, dst = background = world.start_background(decision=Always())
    urgent.go()
    world.areas[0].touch(5)
    world.areas[0].wait_cached(5)
    background[0].go()
    for area in world.areas:
        area.wait_complete()
    assert dst.ended() is None
    world.check()
    source, destination = world.total("s"), world.total("d")
    assert world.total("su").bytes_before == 0, "a requested page goes as it is"
    assert 0 < 2 * source.bytes_after < source.bytes_before < 200 * PAGE
    assert destination.bytes_before == source.bytes_before
    assert destination.bytes_after == source.bytes_after
    assert source.bytes_sent < 140 * PAGE


@pytest.mark.parametrize("pack", [None, Always()])
def test_pages_that_lie_apart_go_together(world: World, pack: Always | None) -> None:
    """Every other page is there already, as after pre-copy or many requests."""
    world.fill(0, range(300))
    world.fill(1, range(0, 100, 3))
    urgent, _ = world.start_urgent()
    background, dst = world.start_background(decision=pack)
    urgent.go()
    for page in range(0, 300, 2):
        world.areas[0].touch(page)
    for page in range(0, 300, 2):
        world.areas[0].wait_cached(page)
    background.go()
    for area in world.areas:
        area.wait_complete()
    assert dst.ended() is None
    world.check()
    source, destination = world.total("sb"), world.total("db")
    assert source.pages == destination.pages == 150 + 34
    assert source.bytes_sent == destination.bytes_received
    # A header for a page each would be more than this.
    assert pack or source.bytes_sent < 184 * (PAGE + 16) + 24 * 12 + 16 * 70


def test_a_limit_is_one_of_the_bytes_on_the_wire(shm: Path) -> None:
    world = World(shm, sizes=(4000,))
    with world.paths[0].open("r+b") as file:
        file.write(b"much the same everywhere" * (4000 * PAGE // 24))
    world.claims.pace = 1 << 20
    background, _ = world.start_background(decision=Always())
    background.go()
    world.areas[0].wait_complete(5)  # 16 s without compression
    world.check()
    world.close()


def test_zero_pages_and_holes_cost_no_page(world: World) -> None:
    world.write(0, 0, bytes(50 * PAGE))  # zero, with memory of its own
    before = [path.stat().st_blocks for path in world.paths]
    urgent, _ = world.start_urgent()
    background, _ = world.start_background()
    urgent.go()
    world.areas[0].touch(10)
    world.areas[0].touch(250)
    for page in (10, 250):
        world.areas[0].wait_cached(page)
    background.go()
    for area in world.areas:
        area.wait_complete()
    time.sleep(0.05)
    totals = world.total("s")
    assert totals.pages == 0 and totals.zero_pages == 400
    assert totals.bytes_sent < PAGE
    assert [path.stat().st_blocks for path in world.paths] == before, "holes were filled in"
    assert os.fstat(world.areas[0].shmem_fd).st_blocks == 0, "zeros were written"


def test_without_background_only_what_is_asked_for_comes(world: World) -> None:
    world.fill(0, range(300))
    urgent, _ = world.start_urgent()
    background, _ = world.start_background()
    urgent.go()
    for page in (5, 250, 77):
        world.areas[0].touch(page)
        world.areas[0].wait_cached(page)
    time.sleep(0.2)
    assert sum(world.areas[0].cached) == 3 and not any(world.areas[1].cached)
    background.go()  # umemctl background
    for area in world.areas:
        area.wait_complete()
    world.check()


def test_the_background_keeps_its_pace(shm: Path) -> None:
    world = World(shm, sizes=(4000,))
    world.fill(0, range(4000))
    world.claims.pace = 0
    urgent, _ = world.start_urgent()
    background, _ = world.start_background()
    urgent.go()
    background.go()
    area = world.areas[0]
    time.sleep(0.2)
    assert not any(area.cached), "a pause"
    area.touch(2000)
    area.wait_cached(2000)
    world.claims.pace = 1
    time.sleep(0.2)
    assert sum(area.cached) == 2, "one page, and the next in an hour"
    began, before = time.monotonic(), sum(area.cached)
    world.claims.pace = 4 << 20
    time.sleep(1)
    seconds, pages = time.monotonic() - began, sum(area.cached) - before
    assert (1 << 20) < pages * PAGE / seconds < (5 << 20)
    world.claims.pace = 1
    time.sleep(0.1)
    world.claims.pace = UNPACED
    area.wait_complete()
    world.check()
    world.close()


def test_a_paused_background_lane_ends(world: World) -> None:
    world.fill(0, range(100))
    world.claims.pace = 0
    background, _ = world.start_background()
    background.go()
    time.sleep(0.1)
    world.close()  # waits for the lanes


def test_requests_overtake_the_background(shm: Path) -> None:
    """On a path that takes 8 MiB/s, 64 MiB of background would hold a page up for seconds."""
    world = World(shm, sizes=(16384,))
    with world.paths[0].open("wb") as file:
        for _ in range(64):
            file.write(os.urandom(1 << 20))
    urgent, _ = world.start_urgent()
    one, other = tcp_pair()
    tune(one, background=True)
    other.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
    source = world._link("sb0", one)
    background = Lane(
        lambda channel: source_background.BackgroundLane(
            channel, source, world._ram(), world._claims(), world.stats["sb0"]
        ).run()
    )
    world.lanes.append(background)
    middle_one, middle_two = tcp_pair()

    def throttle() -> None:
        buffer = bytearray(64 * 1024)
        try:
            while got := other.recv_into(buffer):
                middle_one.sendall(memoryview(buffer)[:got])
                time.sleep(got / (8 << 20))
        except OSError:
            pass

    threading.Thread(target=throttle, daemon=True).start()
    destination = world._link("db0", middle_two)
    filler = Filler(destination, world.areas, world._arrivals(), world.stats["db0"])
    world.lanes.append(Lane(lambda _: destination_background.serve(destination, filler)))
    urgent.go()
    background.go()
    time.sleep(0.3)
    waits = []
    area = world.areas[0]
    for page in range(16000, 12000, -401):
        assert not area.cached[page], "too fast for this test"
        start = time.monotonic()
        area.touch(page)
        area.wait_cached(page)
        waits.append(time.monotonic() - start)
    assert sorted(waits)[len(waits) // 2] < 0.1, waits
    # The cursor follows: what is behind the last request comes next.
    time.sleep(0.4)
    last = page
    assert sum(area.cached[last + 1 : last + 65]) > 0
    other.close()
    middle_one.close()
    world.close()


def test_no_memory_is_waited_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both lanes: the guest stands still, and lives."""
    monkeypatch.setattr(fill, "_NO_MEMORY_S", 0.01)
    world.fill(0, range(200))
    world.areas[0].no_memory = 3
    urgent, _ = world.start_urgent()
    background, _ = world.start_background()
    urgent.go()
    world.areas[0].touch(4)
    world.areas[0].wait_cached(4)
    world.areas[0].no_memory = 4
    background.go()
    world.areas[0].wait_complete()
    assert world.total("du").memory_waits == 3
    assert world.total("db").memory_waits == 4
    world.close()


def test_discarded_is_told_zero_and_not_fetched(world: World) -> None:
    world.fill(0, range(20))
    urgent, _ = world.start_urgent()
    urgent.go()
    world.areas[0].touch(4, DISCARDED)
    world.areas[0].wait_cached(4)
    assert world.areas[0].page(4) == bytes(PAGE)
    time.sleep(0.05)
    assert world.total("s").pages == 0 and world.total("s").zero_pages == 1


@pytest.mark.parametrize("granule", [16, 512])
def test_of_a_granule_all_pages_are_asked_for(shm: Path, granule: int) -> None:
    """And of one that was discarded none is fetched."""
    world = World(shm, sizes=(2048, 512), granule_pages=granule)
    world.fill(0, range(0, 2048, 3))
    world.fill(1, range(512))
    urgent, _ = world.start_urgent()
    urgent.go()
    touched = sorted({page - page % granule for page in (3, 700, 701, 1400)})
    for page in touched:
        world.areas[0].touch(page + 1)
    for page in touched:
        world.areas[0].wait_cached(page)
    assert sum(world.areas[0].cached) == len(touched) * granule
    world.areas[1].touch(5, DISCARDED)
    world.areas[1].wait_cached(5)
    assert world.areas[1].page(5) == bytes(PAGE)
    time.sleep(0.05)
    assert world.total("d").requests == len(touched)
    assert world.total("s").pages + world.total("s").zero_pages == (len(touched) + 1) * granule
    world.close()


def test_a_request_that_comes_twice_is_sent_once(world: World) -> None:
    world.fill(0, range(20))
    urgent, _ = world.start_urgent()
    for _ in range(5):
        world.areas[0].touch(4)
    urgent.go()
    world.areas[0].wait_cached(4)
    time.sleep(0.05)
    assert world.total("s").pages == 1


# --- bad peers ---


class RawPeer:
    """A destination lane with a socket of ours instead of a source."""

    def __init__(self, world: World, urgent: bool) -> None:
        self.sock, other = tcp_pair()
        name = "du" if urgent else "db0"
        link = world._link(name, other)
        if urgent:
            self.lane = Lane(
                lambda channel: destination_urgent.UrgentLane(
                    channel, link, world.areas, world._arrivals(), world.stats[name]
                ).run()
            )
        else:
            filler = Filler(
                *(link, world.areas, world._arrivals(), world.stats[name]),
                unpack=Unpacker(directory()).unpack,
            )
            self.lane = Lane(lambda _: destination_background.serve(link, filler))
        world.lanes.append(self.lane)


PAGES_0 = wire.pack_pages(0, 0, 1, PAGE)


@pytest.mark.parametrize("urgent", [True, False])
@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"QEVM" + bytes(60), "QEMU's own migration stream"),
        (b"\x01" * 64, "not umem's protocol"),
        (wire.pack_pages(0, 300, 1, PAGE), "area vm.ram0 has 300 pages"),
        (wire.pack_pages(0, 299, 2, PAGE), "from page 299 on"),
        (wire.pack_pages(0, (1 << 64) - 1, 1, PAGE), "area vm.ram0 has 300 pages"),
        (wire.pack_pages(0, 0, 0, PAGE), "PAGES of 0 page"),
        (wire.pack(Kind.PAGES, PAGE - 1, 0, 1, 0), f"{PAGE} are expected"),
        (wire.pack_pages(2, 0, 1, PAGE), "area number 2, there are 2"),
        (wire.pack_ranges(1, [(0, 5), (99, 2)]), "area vm.ram1 has 100 pages"),
        (wire.pack_ranges(1, [(0, 0)]), "ZERO of 0 page"),
        (wire.pack(Kind.ZERO, 16, 0, 2) + bytes(16), "ZERO of 2 range"),
        (wire.pack(Kind.BYE), "BYE does not belong"),
        (struct.pack("!HBBIHHIQ", wire.MAGIC, 9, 18, 0, 0, 0, 0, 0), "version 9"),
        (struct.pack("!HBBIHHIQ", wire.MAGIC, 1, 18, 1 << 31, 0, 0, 0, 0), "at most"),
        (PAGES_0 + b"x" * PAGE + PAGES_0 + b"y" * PAGE, "sent before"),
        (wire.pack_ranges(0, [(0, 4), (3, 1)]), "sent before"),
        (wire.pack_scattered(0, [(5, 1), (4, 2)], PAGE) + bytes(3 * PAGE), "sent before"),
        (wire.pack_scattered(1, [(0, 1), (99, 2)], PAGE), "area vm.ram1 has 100 pages"),
        (wire.pack(Kind.SCATTERED, 16 + PAGE, 0, 1) + bytes(16), "SCATTERED of 0 page"),
        (wire.pack(Kind.SCATTERED, 16, 0, 1), "SCATTERED of 1 range"),
        (wire.pack(Kind.SCATTERED, 8 * PAGE, 0, 65), "SCATTERED of 65 range"),
        (PAGES_0 + b"x" * 100, "closed within"),
    ],
)
def test_garbage_ends_the_lane_and_nothing_cached_is_lost(
    world: World, urgent: bool, data: bytes, what: str
) -> None:
    peer = RawPeer(world, urgent)
    peer.sock.sendall(wire.pack_pages(0, 42, 1, PAGE) + b"g" * PAGE + data)
    peer.sock.shutdown(socket.SHUT_WR)
    error = peer.lane.ended()
    assert isinstance(error, ProtocolError | LinkError)
    assert what in str(error) and str(error).startswith("peer-d"), str(error)
    assert world.areas[0].cached[42] and world.areas[0].page(42) == b"g" * PAGE
    for page in (0, 299):
        if world.areas[0].cached[page]:
            assert world.areas[0].page(page) in (b"x" * PAGE, bytes(PAGE))


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (wire.pack_offsets(Kind.REQUEST, 0, [5, 300]), "page 300, area ram0 has 300 pages"),
        (wire.pack_offsets(Kind.DISCARD, 1, [100]), "page 100, area ram1 has 100 pages"),
        (wire.pack_offsets(Kind.REQUEST, 7, [0]), "area number 7"),
        (wire.pack(Kind.REQUEST, 8, 0, 2) + bytes(8), "REQUEST of 2 offset"),
        (wire.pack(Kind.REQUEST, 0, 0, 0), "REQUEST of 0 offset"),
        (PAGES_0, "PAGES does not belong"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "an HTTP client"),
    ],
)
def test_garbage_ends_the_sources_urgent_lane(world: World, data: bytes, what: str) -> None:
    mine, other = tcp_pair()
    link = world._link("su", other)
    lane = Lane(
        lambda channel: source_urgent.UrgentLane(
            channel, link, world._ram(), world._claims(), world.stats["su"]
        ).run()
    )
    world.lanes.append(lane)
    lane.go()
    mine.sendall(data)
    mine.shutdown(socket.SHUT_WR)
    error = lane.ended()
    assert isinstance(error, ProtocolError) and what in str(error), str(error)
    assert str(error).startswith("peer-su")
    assert world.claims.claimed() == 0


def test_a_lost_destination_ends_the_background_lane(world: World) -> None:
    mine, other = tcp_pair()
    link = world._link("sb0", other)
    lane = Lane(
        lambda channel: source_background.BackgroundLane(
            channel, link, world._ram(), world._claims(), world.stats["sb0"]
        ).run()
    )
    world.lanes.append(lane)
    mine.close()
    assert isinstance(lane.ended(), LinkError)


def test_a_background_lane_says_when_all_it_sent_was_taken(world: World) -> None:
    """What the peer's kernel has is not lost with the connection; the rest would be."""
    mine, other = tcp_pair()
    mine.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
    world.fill(0, range(300))
    link = world._link("sb0", other)
    lane = Lane(
        lambda channel: source_background.BackgroundLane(
            channel, link, world._ram(), world._claims(), world.stats["sb0"]
        ).run()
    )
    world.lanes.append(lane)
    lane.go()
    lane.parent.sock.settimeout(0.3)
    with pytest.raises(TimeoutError):
        lane.parent.receive()
    lane.parent.sock.settimeout(10)
    mine.settimeout(0.5)
    with pytest.raises(TimeoutError):
        while mine.recv(1 << 20):
            pass
    assert lane.parent.receive() == ({"event": "drained"}, [])
    mine.close()
    assert isinstance(lane.ended(), LinkError)


@pytest.mark.parametrize("reset", [False, True])
def test_a_background_lane_on_which_nothing_came_is_no_loss(world: World, reset: bool) -> None:
    peer = RawPeer(world, urgent=False)
    if reset:
        peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.sock.close()
    assert peer.lane.ended() is None


def test_an_area_that_fails_ends_a_lane_whose_peer_does_not_read(world: World) -> None:
    """Errors are reported although nothing is asked for: they must not be polled for ever."""
    gone, other_end = os.pipe()
    os.close(other_end)

    calls = itertools.count()

    class Fenced(FakeArea):
        def fileno(self) -> int:
            return gone

        def requests(self) -> memoryview:
            if next(calls) == 0:
                return super().requests()
            raise DriverError("read requests", errno.ESTALE, area=self.name)

    mine, other = tcp_pair()
    link = world._link("du", other)
    fenced = Fenced("vm.ram9", 300)

    def body(channel: Channel) -> None:
        lane = destination_urgent.UrgentLane(
            channel, link, [fenced, world.areas[1]], world._arrivals(), world.stats["du"]
        )
        lane._out += bytes(64 << 20)
        lane.run()

    lane = Lane(body)
    world.lanes.append(lane)
    assert isinstance(lane.ended(), DriverError)
    fenced.close()
    os.close(gone)
    mine.close()


def test_received_map_notes_whole_ranges() -> None:
    slots = Slots([10])
    arrivals = Arrivals(slots, SharedMemory.create("r", 10), SharedMemory.create("a", 80))
    assert arrivals.coming(2, 3)
    assert not arrivals.coming(0, 3) and not arrivals.coming(4, 1)
    assert arrivals.coming(0, 2) and arrivals.coming(5, 5)
    assert arrivals.asked_now(4) and not arrivals.asked_now(4)


def test_what_a_lost_lane_had_asked_for_is_asked_for_again(tmp_path: Path) -> None:
    """More of it than the socket takes at once, and new requests come as well."""
    npages = 40000
    world = World(tmp_path, sizes=(npages, 100))
    try:
        for page in range(npages):
            world.areas[0].touch(page)
        world.areas[0].requests()  # by the lane that was lost
        world.areas[0].touch(5)  # delivered twice, and sent once
        source, _ = world.start_urgent(resumed=True)
        world.areas[1].touch(7)
        time.sleep(0.3)
        source.go()
        world.areas[1].wait_cached(7)
        world.areas[0].wait_complete()
        assert world.stats["du"].read().requests == npages + 1
    finally:
        world.close()
