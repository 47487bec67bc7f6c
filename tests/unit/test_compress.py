# SPDX-License-Identifier: GPL-2.0-or-later
"""Compressed runs: what comes back is what went in, and nothing else comes out of bad data."""

from __future__ import annotations

import os
import random
import socket
import threading

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from pyumem import compression, wire
from pyumem.claims import Slots
from pyumem.compression import Compress, accept, directory, offer
from pyumem.errors import ProtocolError, UsageError
from pyumem.hello import Hello, Lane
from pyumem.lanes.compress import Packer, Unpacker
from pyumem.lanes.fill import Arrivals, Filler
from pyumem.lanes.link import Link
from pyumem.lanes.payoff import Always
from pyumem.stats import StatsBlock
from tests.unit.fakes import PAGE, FakeArea

STATS = StatsBlock.create("test")
PACKER = Packer(directory(), Always(), STATS)
UNPACKER = Unpacker(directory())


def unpack(packed: bytes, size: int) -> bytes:
    """Unpack into the middle of a buffer, around which nothing may change."""
    guard = 4096
    buffer = bytearray(b"\xaa" * (size + 2 * guard))
    try:
        UNPACKER.unpack(memoryview(packed), memoryview(buffer)[guard : guard + size])
    finally:
        assert buffer[:guard] == buffer[guard + size :] == b"\xaa" * guard
    return bytes(buffer[guard : guard + size])


pieces = st.one_of(
    st.binary(min_size=1, max_size=64).map(lambda piece: (piece * PAGE)[:PAGE]),
    st.integers(0, 1 << 30).map(lambda seed: random.Random(seed).randbytes(PAGE)),
)


@given(st.lists(pieces, min_size=1, max_size=64))
@settings(max_examples=50)
def test_pages_come_back(pages: list[bytes]) -> None:
    run = b"".join(pages)
    packed = PACKER.pack(memoryview(run))
    if packed is not None:
        assert len(packed) < len(run)
        assert unpack(bytes(packed), len(run)) == run


def test_what_does_not_shrink_goes_as_it_is() -> None:
    before = STATS.read()
    assert PACKER.pack(memoryview(os.urandom(16 * PAGE))) is None
    assert PACKER.pack(memoryview(bytearray(wire.MAX_PACKED + PAGE))) is None, "above the bound"
    assert STATS.read() == before


def test_a_run_that_changes_meanwhile() -> None:
    """Each byte is an old or a new one, and it is a run that comes back."""
    packer = Packer(directory(), Always(), STATS, live=True)
    old, new = b"0123456789abcdef" * 4096, b"fedcba9876543210" * 4096
    run = bytearray(old)
    over = threading.Event()

    def write() -> None:
        chooser = random.Random(1)
        while not over.is_set():
            at, size = chooser.randrange(len(run)), chooser.randrange(1, 5000)
            run[at : at + size] = chooser.choice((old, new))[at : at + size]

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(200):
            packed = packer.pack(memoryview(run))
            assert packed is not None
            found = unpack(bytes(packed), len(run))
            assert all(a in (b, c) for a, b, c in zip(found, old, new, strict=True))
    finally:
        over.set()
        writer.join()


TEXT = b"some text, and some more of it " * 600
GOOD = zstandard.ZstdCompressor().compress(TEXT)
GIB = zstandard.ZstdCompressor(level=19).compress(bytes(1 << 28))


def with_window(log: int) -> bytes:
    parameters = zstandard.ZstdCompressionParameters(window_log=log)
    writer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return writer.compress(TEXT) + writer.flush()


@pytest.mark.parametrize(
    ("packed", "size", "why"),
    [
        pytest.param(GOOD, len(TEXT) - 1, "give more", id="one byte too many"),
        pytest.param(GOOD, len(TEXT) + 1, f"give {len(TEXT)} bytes", id="one byte too few"),
        pytest.param(GIB, 64 * PAGE, "give more|not zstd", id="bomb"),
        pytest.param(with_window(27), len(TEXT), "not zstd", id="window of 128 MiB"),
        pytest.param(GOOD[:-1], len(TEXT), "give", id="truncated"),
        pytest.param(GOOD[:3], len(TEXT), "give 0", id="nothing but a beginning"),
        pytest.param(GOOD + b"rest", len(TEXT), "not zstd", id="garbage behind it"),
        pytest.param(GOOD + GOOD, len(TEXT), "give more", id="another frame behind it"),
        pytest.param(b"\0" * 100, len(TEXT), "not zstd", id="zeros"),
        pytest.param(TEXT[:100], len(TEXT), "not zstd", id="text"),
    ],
)
def test_other_data_is_refused(packed: bytes, size: int, why: str) -> None:
    with pytest.raises(ProtocolError, match=why):
        unpack(packed, size)
    assert unpack(GOOD, len(TEXT)) == TEXT, "the next one is none the worse for it"


@given(st.binary(max_size=300), st.integers(0, len(GOOD)), st.integers(0, 200))
def test_damage_is_refused_or_stays_within_the_pages(rest: bytes, at: int, cut: int) -> None:
    damaged = GOOD[:at] + rest + GOOD[at + cut :]
    try:
        unpack(damaged, len(TEXT))
    except ProtocolError as e:
        assert len(str(e)) < 200


class Scene:
    """A filler that takes compressed pages, or does not, and who sends them."""

    def __init__(self, *, takes: bool = True) -> None:
        self.peer, sock = socket.socketpair()
        self.area = FakeArea("vm.ram0", 100)
        self.link = Link(sock, "peer", STATS)
        unpacker = UNPACKER.unpack if takes else None
        arrivals = Arrivals.create(Slots([100]))
        self.filler = Filler(self.link, [self.area], arrivals, STATS, unpack=unpacker)

    def take(self, pgoff: int, count: int, packed: bytes) -> None:
        self.peer.sendall(wire.pack_packed(0, pgoff, count, len(packed)) + packed)
        header = self.link.header()
        assert header
        self.filler.take(header)


PAGES = (b"0123456789abcdef" * (PAGE // 16)) * 3


def test_a_filler_takes_compressed_pages() -> None:
    scene = Scene()
    scene.take(7, 3, zstandard.compress(PAGES))
    assert [scene.area.page(page) for page in (7, 8, 9)] == [PAGES[:PAGE]] * 3
    assert scene.area.marks == [(7, 3)]


@pytest.mark.parametrize(
    ("pgoff", "count", "packed", "why"),
    [
        (
            0,
            3,
            zstandard.compress(PAGES + b"x"),
            r"PACKED of 3 page.* from page 0 .*give more",
        ),
        (0, 3, zstandard.compress(PAGES)[:-2], r"area vm.ram0: .* announced"),
        (0, 3, b"garbage", "not zstd data"),
        (98, 3, zstandard.compress(PAGES), r"area vm.ram0 has 100 pages"),
        (0, 65, zstandard.compress(PAGES), "at most 64"),
        (0, 1, b"x" * PAGE, "not between"),
        (0, 1, b"", "not between"),
    ],
)
def test_bad_compressed_pages_end_the_lane(pgoff: int, count: int, packed: bytes, why: str) -> None:
    scene = Scene()
    with pytest.raises(ProtocolError, match=f"^peer: .*{why}"):
        scene.take(pgoff, count, packed)
    assert not scene.area.marks and not any(scene.area.page(pgoff))


def test_who_did_not_agree_takes_none() -> None:
    scene = Scene(takes=False)
    with pytest.raises(ProtocolError, match="peer: PACKED does not belong on this lane"):
        scene.take(0, 3, zstandard.compress(PAGES))


def test_a_page_comes_once_compressed_or_not() -> None:
    scene = Scene()
    scene.take(7, 3, zstandard.compress(PAGES))
    with pytest.raises(ProtocolError, match="sent before"):
        scene.take(9, 3, zstandard.compress(PAGES))


# --- the agreement ---


def hello(lane: Lane, compression: str) -> Hello:
    return Hello(lane, "0" * 32, "vm1", "ab" * 32, "umem", compression=compression)


def test_what_is_offered_and_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [offer(wish) for wish in Compress] == ["zstd", "zstd", ""]
    assert accept(hello(Lane.BACKGROUND, "zstd")) == "zstd"
    assert accept(hello(Lane.PRECOPY, "zstd")) == "zstd"
    assert accept(hello(Lane.URGENT, "zstd")) == "", "requested pages go as they are"
    assert accept(hello(Lane.BACKGROUND, "")) == accept(hello(Lane.BACKGROUND, "lz77")) == ""
    monkeypatch.setattr(compression, "directory", lambda: "")
    assert accept(hello(Lane.BACKGROUND, "zstd")) == offer(Compress.AUTO) == ""
    with pytest.raises(UsageError, match="zstandard"):
        offer(Compress.ON)
