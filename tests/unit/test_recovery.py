# SPDX-License-Identifier: GPL-2.0-or-later
"""What the two sides say when a committed migration is taken up again, and what they keep."""

from __future__ import annotations

import array
import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyumem import wire
from pyumem.area import Area
from pyumem.claims import ClaimMap, Slots
from pyumem.commit_record import CommitRecord, names
from pyumem.destination import Phase
from pyumem.errors import CheckError, LinkError, ProtocolError, UmemError
from pyumem.greeting import AsyncLink
from pyumem.heartbeat import beat
from pyumem.hello import AreaSpec, Hello, Lane
from pyumem.incoming_record import IncomingRecord, left_behind
from pyumem.lanes.fill import Arrivals
from pyumem.process import ProcessName
from pyumem.qemu import RamBlock
from pyumem.ram import PAGE_SIZE
from pyumem.recovery import Fate, Verdict, hear_have, hear_verdict, tell_have
from pyumem.wire import Kind


def run(work: Callable[[AsyncLink, AsyncLink], Awaitable[None]]) -> None:
    async def main() -> None:
        one, other = socket.socketpair()
        here, there = AsyncLink(one, "there"), AsyncLink(other, "here")
        try:
            async with asyncio.timeout(20):
                await work(here, there)
        finally:
            here.close()
            there.close()

    asyncio.run(main())


# --- the bitmap ---


class FakeArea:
    def __init__(self, cached: list[bool]) -> None:
        self.npages = len(cached)
        self._words = array.array("Q", [0] * -(-len(cached) // 64))
        for page, here in enumerate(cached):
            self._words[page // 64] |= here << page % 64

    def page_bitmap(self) -> array.array[int]:
        return array.array("Q", self._words)


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=200), min_size=1, max_size=3))
def test_the_source_knows_what_the_destination_has(areas: list[list[bool]]) -> None:
    claims = ClaimMap.create(Slots([len(area) for area in areas]))
    specs = [AreaSpec(f"ram{i}", len(area) * PAGE_SIZE, PAGE_SIZE) for i, area in enumerate(areas)]

    async def work(source: AsyncLink, destination: AsyncLink) -> None:
        # What an earlier life of the lanes claimed and lost does not count any more.
        claims.claim_range(0, claims.slots.total)
        fakes = cast("list[Area]", [FakeArea(area) for area in areas])
        await asyncio.gather(tell_have(destination, fakes), hear_have(source, specs, claims))

    run(work)
    free = [
        slot
        for start, n in claims.claim_range(0, claims.slots.total)
        for slot in range(start, start + n)
    ]
    flat = [here for area in areas for here in area]
    assert free == [slot for slot, here in enumerate(flat) if not here]
    claims.close()


def test_a_bitmap_goes_in_bounded_pieces() -> None:
    npages = 8 * wire.MAX_BITMAP + 70
    claims = ClaimMap.create(Slots([npages]))
    cached = [page % 3 == 0 for page in range(npages)]

    async def work(source: AsyncLink, destination: AsyncLink) -> None:
        area = cast(Area, FakeArea(cached))
        spec = AreaSpec("ram0", npages * PAGE_SIZE, PAGE_SIZE)
        await asyncio.gather(tell_have(destination, [area]), hear_have(source, [spec], claims))

    run(work)
    assert claims.claimed() == sum(cached)
    claims.close()


@pytest.mark.parametrize(
    ("frame", "what"),
    [
        (wire.pack_bitmap(0, 0, 8, b"\0\0"), "HAVE of 8 page.s. of area ram0 with 2 bytes"),
        (wire.pack_bitmap(0, 0, 101, bytes(13)), "area ram0 has 100 pages"),
        (wire.pack_bitmap(0, 8, 8, b"\0"), "page 0 of area ram0 is next"),
        (wire.pack_bitmap(1, 0, 8, b"\0"), "from page 0 of area number 1 on, page 0"),
        (wire.pack(Kind.BYE), "BYE instead of HAVE"),
    ],
)
def test_a_wrong_bitmap_is_refused(frame: bytes, what: str) -> None:
    claims = ClaimMap.create(Slots([100]))

    async def work(source: AsyncLink, destination: AsyncLink) -> None:
        await destination.send(frame)
        with pytest.raises(ProtocolError, match=what):
            await hear_have(source, [AreaSpec("ram0", 100 * PAGE_SIZE, PAGE_SIZE)], claims)

    run(work)
    claims.close()


def test_a_page_that_is_here_is_refused_after_a_recovery_too() -> None:
    arrivals = Arrivals.create(Slots([100]))
    assert arrivals.know(0, 100, array.array("Q", [1 << 5 | 1 << 63, 1 << 35])) == 3
    assert arrivals.received.map[:100].count(b"\2") == 3
    assert not arrivals.coming(99, 1) and not arrivals.coming(5, 1)
    assert arrivals.coming(6, 50)
    arrivals.close()


# --- the verdict ---


@given(st.sampled_from(Fate), st.text(max_size=300))
def test_a_verdict_arrives(fate: Fate, reason: str) -> None:
    async def work(source: AsyncLink, destination: AsyncLink) -> None:
        await destination.send(wire.pack(Kind.PING))
        await destination.send_json(Kind.VERDICT, Verdict(fate, reason).to_json())
        assert await hear_verdict(source) == Verdict(fate, reason)

    run(work)


@pytest.mark.parametrize("message", [{}, {"fate": "well", "reason": ""}, {"fate": "here"}])
def test_a_malformed_verdict_is_refused(message: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        Verdict.from_json(message)


# --- signs of life ---


def test_a_silent_peer_is_given_up() -> None:
    async def work(source: AsyncLink, destination: AsyncLink) -> None:
        alive = asyncio.create_task(beat(destination, ping_s=0.02, silence_s=5))
        listening = asyncio.create_task(drain(source))
        watching = asyncio.create_task(beat(source, ping_s=0.02, silence_s=0.2))
        await asyncio.sleep(0.6)
        assert not watching.done(), "it was heard all the time"
        alive.cancel()
        with pytest.raises(LinkError, match=r"there: silent for 0.2 s"):
            await watching
        listening.cancel()
        await asyncio.gather(alive, listening, return_exceptions=True)

    run(work)


def test_a_peer_that_does_not_take_is_given_up_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """send() waits for room for ever then."""
    monkeypatch.setattr(wire, "pack", lambda _kind: bytes(1 << 22))

    async def work(source: AsyncLink, _destination: AsyncLink) -> None:
        with pytest.raises(LinkError, match="silent"):
            await beat(source, ping_s=0.02, silence_s=0.1)

    run(work)


async def drain(link: AsyncLink) -> None:
    while await link.receive():
        pass


# --- processes, by a name that is theirs alone ---


def test_a_process_is_killed_by_its_name() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    name = ProcessName.of(child.pid)
    stranger = ProcessName(child.pid, name.started + 1)

    async def work() -> None:
        assert await stranger.kill(5) and not stranger.signal(signal.SIGKILL)
        assert child.poll() is None, "another process of that number was meant"
        assert name.signal(signal.SIGSTOP)
        assert await name.kill(5)

    asyncio.run(work())
    assert child.wait() == -signal.SIGKILL
    assert not name.signal(signal.SIGCONT)
    with pytest.raises(UmemError, match="is gone"):
        ProcessName.of(child.pid)


# --- records ---


@pytest.fixture
def runtime_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UMEM_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "migrate").mkdir()
    return tmp_path


def commit_record() -> CommitRecord:
    return CommitRecord(
        vm="vm1",
        session="0" * 32,
        destination="tcp:h:1",
        committed=True,
        committed_at="now",
        answered=False,
        was_running=True,
        background_lanes=2,
        qmp="/qmp",
        qemu=ProcessName.of(os.getpid()),
        ram=(RamBlock("ram0", "/dev/shm/x", 4096),),
    )


@pytest.mark.usefixtures("runtime_dir")
def test_a_commit_record_is_read_as_written() -> None:
    with pytest.raises(CheckError, match="vm1 has not left this host"):
        CommitRecord.read("vm1")
    record = commit_record()
    record.write()
    assert CommitRecord.read("vm1") == record and names() == ["vm1"]
    answered = record.answer(record.address)
    assert CommitRecord.read("vm1") == answered and answered.answered
    answered.remove()
    assert names() == []


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"vm": 1}'])
def test_a_broken_commit_record_is_told(runtime_dir: Path, text: str) -> None:
    (runtime_dir / "migrate/vm1.json").write_text(text)
    with pytest.raises(CheckError, match=r"vm1.json cannot be read"):
        CommitRecord.read("vm1")


def test_a_vm_that_came_is_found_by_the_next_daemon(
    runtime_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hello = Hello(
        Lane.CONTROL, "0" * 32, "vm1", "ab" * 32, "umem", areas=(AreaSpec("ram0", 4096, 4096),)
    )
    record = IncomingRecord(
        name="vm1",
        listen="tcp:0:4444",
        phase=Phase.PREPARED,
        hello=hello,
        qmp="/qmp",
        incoming="/in",
        qemu=ProcessName.of(os.getpid()),
        autostart=True,
        touch=False,
        areas=hello.areas,
        area_ids=(3,),
    )
    record.write()
    record.at(Phase.STARTED).write()
    (runtime_dir / "incoming/junk.json").write_text("{")
    assert left_behind() == [record.at(Phase.STARTED)]
    assert "junk.json cannot be read" in caplog.text
    record.remove()
    assert left_behind() == []
