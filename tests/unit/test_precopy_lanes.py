# SPDX-License-Identifier: GPL-2.0-or-later
"""Pre-copy lanes over loopback: pages come again and again, and nobody sees them before the end."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from pyumem import wire
from pyumem.claims import ClaimMap, Slots
from pyumem.compression import directory
from pyumem.errors import LinkError, ProtocolError
from pyumem.lanes import destination_precopy, source_precopy
from pyumem.lanes.compress import Packer
from pyumem.lanes.destination_precopy import PrecopyFiller
from pyumem.lanes.fill import make_unpack
from pyumem.lanes.payoff import Always
from pyumem.ram import PAGE_SIZE, RamFile
from pyumem.stats import StatsBlock
from pyumem.wire import Kind
from tests.unit.fakes import PAGE
from tests.unit.test_lanes import Lane, World, tcp_pair

SIZES = (300, 100)


@pytest.fixture
def world() -> Iterator[World]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as tmp:
        world = World(Path(tmp), sizes=SIZES)
        for name in ("sp0", "sp1", "dp0", "dp1"):
            world.stats[name] = StatsBlock.create(name)
        yield world
        world.close()


class Lanes:
    """So many pairs of them, over one claim map of their own."""

    def __init__(self, world: World, nr: int, *, packed: bool = False) -> None:
        self.world = world
        self.claims = ClaimMap.create(Slots(SIZES))
        self.offer([])
        self.sources, self.destinations = [], []
        for n in range(nr):
            source, destination = world._links(f"sp{n}", f"dp{n}", background=True)
            claims = ClaimMap.attach(os.dup(self.claims.memory.fd), Slots(SIZES))
            ram = [
                RamFile(os.open(path, os.O_RDONLY), f"ram{i}", size * PAGE, live=True)
                for i, (path, size) in enumerate(zip(world.paths, SIZES, strict=True))
            ]
            stats = world.stats[f"sp{n}"]
            packer = Packer(directory(), Always(), stats, live=True) if packed else None
            make = partial(
                source_precopy.PrecopyLane,
                link=source,
                ram=ram,
                claims=claims,
                stats=stats,
                packer=packer,
            )
            self.sources.append(Lane(lambda channel, make=make: make(channel).run()))  # type: ignore[misc]
            filler = PrecopyFiller(
                destination,
                world.areas,
                world._arrivals(),
                world.stats[f"dp{n}"],
                unpack=make_unpack(directory() if packed else ""),
            )
            self.destinations.append(
                Lane(
                    lambda _, link=destination, filler=filler: (  # type: ignore[misc]
                        destination_precopy.serve(link, filler)
                    )
                )
            )
        world.lanes += [*self.sources, *self.destinations]

    def offer(self, slots: list[int]) -> None:
        taken = bytearray(b"\xff" * -(-sum(SIZES) // 8))
        for slot in slots:
            taken[slot // 8] &= ~(1 << slot % 8)
        self.claims.know(0, sum(SIZES), bytes(taken))

    def round(self, slots: list[int]) -> None:
        self.offer(slots)
        for lane in self.sources:
            lane.go()
        for lane in self.sources:
            lane.parent.sock.settimeout(20)
            assert lane.parent.receive() == ({"event": "round"}, [])

    def end(self) -> None:
        for lane in self.sources:
            lane.parent.send({"command": "end"})
        for lane in self.destinations:
            assert lane.ended() is None
        for lane in self.sources:
            assert lane.parent.receive() == ({"event": "drained"}, [])


def _text(chooser: random.Random) -> bytes:
    """A page that shrinks."""
    return (chooser.randbytes(16).hex().encode() * PAGE)[:PAGE]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("nr", [1, 2])
def test_what_was_sent_last_is_what_is_there(world: World, nr: int, packed: bool) -> None:
    chooser = random.Random(1)
    world.fill(0, range(0, 300, 2))
    world.fill(1, range(100))
    lanes = Lanes(world, nr, packed=packed)
    lanes.round(list(range(400)))
    for _ in range(5):
        pages = sorted(chooser.sample(range(400), 60))
        for slot in pages:
            area, page = (0, slot) if slot < 300 else (1, slot - 300)
            new = chooser.choice((bytes(PAGE), chooser.randbytes(PAGE), _text(chooser)))
            world.write(area, page, new)
        lanes.round(pages)
    lanes.round([])
    lanes.end()
    for fake, path in zip(world.areas, world.paths, strict=True):
        assert not any(fake.cached) and not fake.marks, "nobody may see it yet"
        assert os.pread(fake.shmem_fd, fake.npages * PAGE, 0) == path.read_bytes()
    sent = world.total("sp")
    assert sent.pages + sent.zero_pages == 400 + 5 * 60
    received = world.total("dp")
    assert (sent.bytes_before > 0) == packed
    assert (sent.bytes_before, sent.bytes_after) == (received.bytes_before, received.bytes_after)


@pytest.mark.parametrize("way", ["urgent", "background"])
def test_a_stale_page_that_is_zero_now(world: World, way: str) -> None:
    """It was sent in a round, and the guest has cleared it since: nobody may see what it held."""
    world.fill(0, range(20))
    lanes = Lanes(world, 1)
    lanes.round(list(range(400)))
    lanes.end()
    world.write(0, 7, bytes(PAGE))
    world.areas[0].mark([(0, 7), (8, 292)])
    world.areas[1].mark([(0, 100)])
    world.claims.claim([slot for slot in range(400) if slot != 7])
    for slot in range(400):
        world.arrivals.received.map[slot] = 0 if slot == 7 else 2
    lane, _ = world.start_urgent() if way == "urgent" else world.start_background()
    world.areas[0].touch(7)
    lane.go()
    world.areas[0].wait_cached(7)
    assert world.areas[0].page(7) == bytes(PAGE)


def test_what_is_a_hole_at_the_source_becomes_one(world: World) -> None:
    """A page that was given back after it had been sent."""
    world.fill(0, range(20))
    lanes = Lanes(world, 1)
    lanes.round(list(range(20)))
    assert os.fstat(world.areas[0].shmem_fd).st_blocks > 0
    fd = os.open(world.paths[0], os.O_RDWR)
    os.truncate(fd, 0)
    os.truncate(fd, 300 * PAGE)
    os.close(fd)
    lanes.round(list(range(20)))
    lanes.end()
    assert os.fstat(world.areas[0].shmem_fd).st_blocks == 0


def test_a_hole_is_not_read_into_being(world: World) -> None:
    """The host may be short of memory: that is why it sends its VMs away."""
    lanes = Lanes(world, 1)
    lanes.round(list(range(400)))
    lanes.end()
    assert all(path.stat().st_blocks == 0 for path in world.paths)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (wire.pack_pages(0, 299, 2, PAGE_SIZE), "from page 299 on"),
        (wire.pack_ranges(1, [(99, 2)]), "area vm.ram1 has 100 pages"),
        (wire.pack_scattered(1, [(0, 1), (99, 2)], PAGE_SIZE), "area vm.ram1 has 100 pages"),
        (wire.pack(Kind.SCATTERED, 16 + PAGE_SIZE, 0, 2) + bytes(32), "SCATTERED of 0 page"),
        (wire.pack_packed(0, 299, 2, 9) + b"x" * 9, "from page 299 on"),
        (wire.pack_packed(0, 7, 1, 9) + b"x" * 9, "page 7 on, area vm.ram0: not zstd data"),
        (wire.pack(Kind.BYE), "does not belong"),
        (b"x" * 64, "not umem's protocol"),
        (b"", "closed a pre-copy lane before its end"),
    ],
)
def test_garbage(world: World, data: bytes, what: str) -> None:
    mine, other = tcp_pair()
    link = world._link("dp0", other)
    filler = PrecopyFiller(
        link, world.areas, world._arrivals(), world.stats["dp0"], unpack=make_unpack(directory())
    )
    lane = Lane(lambda _: destination_precopy.serve(link, filler))
    world.lanes.append(lane)
    with mine:
        mine.sendall(data)
        mine.shutdown(1)
        error = lane.ended()
    assert isinstance(error, ProtocolError | LinkError) and what in str(error)


def test_the_rest_of_a_round_can_be_taken_back() -> None:
    claims = ClaimMap.create(Slots(SIZES))
    claims.claim([0, 5, 399])
    free = claims.take_free()
    assert free == ((1 << 400) - 1) & ~(1 | 1 << 5 | 1 << 399)
    assert claims.take_free() == 0 and claims.claim_runs(64) == []
    claims.close()
