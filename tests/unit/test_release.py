# SPDX-License-Identifier: GPL-2.0-or-later
"""RAM that is given back while it moves."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyumem import wire
from pyumem.address import Address
from pyumem.errors import CheckError, ProtocolError
from pyumem.greeting import AsyncLink
from pyumem.qemu import RamBlock
from pyumem.ram import PAGE_SIZE
from pyumem.release import Release, runs
from pyumem.report import State
from pyumem.source import Migration
from pyumem.source_base import Plan
from pyumem.tls import Security

NPAGES = 64


@given(st.lists(st.booleans(), max_size=300))
def test_runs_are_the_stretches_of_ones(pages: list[bool]) -> None:
    bits = sum(here << page for page, here in enumerate(pages)).to_bytes(
        -(-len(pages) // 8), "little"
    )
    found = [page for first, count in runs(bits) for page in range(first, first + count)]
    assert found == [page for page, here in enumerate(pages) if here]
    ends = [first + count for first, count in runs(bits)]
    assert all(first not in ends for first, _ in runs(bits)), "neighbours are joined"


@pytest.fixture
def ram() -> Iterator[Path]:
    path = Path(f"/dev/shm/umem-test-{os.getpid()}")
    path.write_bytes(b"".join(bytes([page + 1]) * PAGE_SIZE for page in range(NPAGES)))
    yield path
    path.unlink()


def test_what_the_destination_has_is_given_back_once(ram: Path) -> None:
    with Release([RamBlock("ram0", str(ram), NPAGES * PAGE_SIZE)]) as release:
        release.take(0, 0, bytes([0b11100001, 0, 0, 0, 0, 0, 0, 0x80]))
        release.take(0, 8, bytes([0, 1]))
        release.take(0, 0, bytes([0b11100001, 0, 1]))
        assert release.pages == 6
    gone = {0, 5, 6, 7, 16, 63}
    data = ram.read_bytes()
    for page in range(NPAGES):
        expected = 0 if page in gone else page + 1
        assert data[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] == bytes([expected]) * PAGE_SIZE
    assert ram.stat().st_size == NPAGES * PAGE_SIZE
    assert ram.stat().st_blocks * 512 == (NPAGES - len(gone)) * PAGE_SIZE


def test_what_cannot_be_given_back_is_refused() -> None:
    with pytest.raises(CheckError, match="--release-ram: RAM block ram0: /dev/zero is no regular"):
        Release([RamBlock("ram0", "/dev/zero", PAGE_SIZE)])
    with pytest.raises(CheckError, match="No such file"):
        Release([RamBlock("ram0", "/nowhere/x", PAGE_SIZE)])


@pytest.mark.parametrize("state", [State.SETUP, State.DEVICE])
def test_nothing_is_given_back_before_the_commit(ram: Path, state: State) -> None:
    """What a destination says then is a lie: the page here is the only one."""

    async def main() -> None:
        plan = Plan(Path("/qmp"), Address("h", 1), Security(), release_ram=True)
        migration = Migration(plan, print)
        migration._take_ram([RamBlock("ram0", str(ram), NPAGES * PAGE_SIZE)])
        migration._make_claims()
        migration.state = state
        lanes = migration._new_lanes()
        one, other = socket.socketpair()
        lanes.link, peer = AsyncLink(one, "destination"), AsyncLink(other, "source")
        lanes.follow()
        await peer.send(wire.pack_bitmap(0, 0, NPAGES, b"\xff" * 8))
        with pytest.raises(ProtocolError, match="HAVE out of turn"):
            await asyncio.wait_for(asyncio.shield(lanes.broken), 10)
        peer.close()
        await migration._close()

    asyncio.run(main())
    assert ram.read_bytes()[-1] == NPAGES
