# SPDX-License-Identifier: GPL-2.0-or-later
"""`umemctl migrate --resume` against a destination that is played here, and a QEMU that is none."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import signal
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import pytest

from pyumem import runtime, serving, wire
from pyumem.address import Address
from pyumem.area import Area
from pyumem.commit_record import CommitRecord
from pyumem.errors import LostError, UmemError
from pyumem.greeting import AsyncLink, admit, refuse, welcome
from pyumem.hello import Lane
from pyumem.process import ProcessName
from pyumem.qemu import RamBlock
from pyumem.recovery import Fate, Verdict, tell_have
from pyumem.report import Report, State
from pyumem.serving import Resumed
from pyumem.source import Migration
from pyumem.source_base import Plan
from pyumem.tls import Security
from pyumem.wire import Kind
from tests.unit.fake_qemu import FakeQemu, fake_qemu
from tests.unit.test_recovery import FakeArea

PAGE = mmap.PAGESIZE
NPAGES = 200
ANSWERS = {"query-status": {"status": "running"}, "query-migrate": {}}


class Scene:
    """The source's host after a `umemctl migrate` that was killed."""

    def __init__(self, tmp: Path, *, answered: bool, committed: bool) -> None:
        self.tmp, self.committed = tmp, committed
        self.ram = tmp / "ram0"
        self.ram.write_bytes(b"".join(bytes([1 + page % 255]) * PAGE for page in range(NPAGES)))
        (tmp / "migrate").mkdir()
        self.answered = answered
        self.said: list[str] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setblocking(False)
        self.migration: Resumed
        self.qemu: FakeQemu | None = None
        self.qemu_ended: int | None
        self.open: list[AsyncLink]

    def record(self, qemu: FakeQemu) -> CommitRecord:
        host, port = self.listener.getsockname()
        record = CommitRecord(
            vm="vm1",
            session="0" * 32,
            destination=str(Address(host, port)),
            committed=self.committed,
            committed_at="now",
            answered=self.answered,
            was_running=True,
            background_lanes=1,
            qmp=str(qemu.qmp),
            qemu=ProcessName.of(qemu.process.pid),
            ram=(RamBlock("ram0", str(self.ram), NPAGES * PAGE),),
        )
        record.write()
        return record

    async def connection(self) -> tuple[AsyncLink, Lane]:
        """Admit the next one that comes."""
        sock, _ = await asyncio.get_running_loop().sock_accept(self.listener)
        link = AsyncLink(sock, "source")
        hello = await admit(link, Security())
        assert hello.session == "0" * 32 and hello.resume is (hello.lane is Lane.CONTROL)
        self.hello = hello
        return link, hello.lane

    async def verdict(self, verdict: Verdict) -> AsyncLink:
        link, lane = await self.connection()
        assert lane is Lane.CONTROL
        await welcome(link, b"", self.hello)
        await link.send_json(Kind.VERDICT, verdict.to_json())
        return link


def run(
    tmp: Path,
    monkeypatch: pytest.MonkeyPatch,
    destination: Callable[[Scene], Awaitable[None]],
    *,
    answered: bool = True,
    committed: bool = True,
) -> tuple[Scene, FakeQemu, Report | UmemError]:
    """Resume against `destination`.  Returns what became of it."""
    monkeypatch.setenv("UMEM_RUNTIME_DIR", str(tmp))
    monkeypatch.setattr(serving, "_FIRST_RETRY_S", 0.01)
    scene = Scene(tmp, answered=answered, committed=committed)

    async def main(qemu: FakeQemu) -> Report | UmemError:
        record = scene.record(qemu)
        scene.qemu = qemu
        os.kill(qemu.process.pid, signal.SIGSTOP)
        plan = Plan(qemu.qmp, record.address, Security(), background=False)
        scene.migration = Resumed(plan, record, scene.said.append)
        played = asyncio.create_task(asyncio.wait_for(destination(scene), 60))
        try:
            return await asyncio.wait_for(scene.migration.run(), 60)
        except UmemError as e:
            return e
        finally:
            await played

    with scene.listener, fake_qemu(tmp, scene.ram, answers=ANSWERS) as qemu:
        result = asyncio.run(main(qemu))
        scene.qemu_ended = qemu.process.poll()
        return scene, qemu, result


def test_all_of_it_was_there_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def destination(scene: Scene) -> None:
        link, _ = await scene.connection()
        await refuse(link, "not known here")  # a daemon that has not adopted it yet
        link.close()
        link, _ = await scene.connection()
        link.close()
        await scene.verdict(Verdict(Fate.COMPLETE))

    scene, _, report = run(tmp_path, monkeypatch, destination, answered=False)
    assert isinstance(report, Report) and report.state is State.COMPLETED
    assert not list((tmp_path / "migrate").glob("*.json"))
    assert scene.qemu_ended == -signal.SIGKILL, "it may never run again"
    assert any("not known here" in line for line in scene.said)


def test_the_guest_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def destination(scene: Scene) -> None:
        await scene.verdict(Verdict(Fate.ENDED, "guest-shutdown"))

    _, _, report = run(tmp_path, monkeypatch, destination)
    assert isinstance(report, Report) and report.guest_ended == "guest-shutdown"


@pytest.mark.parametrize("fate", [Fate.GONE, Fate.ABORTED])
def test_an_end_that_is_the_users_to_judge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fate: Fate
) -> None:
    """Also one that cannot be: it had said that it runs there."""

    async def destination(scene: Scene) -> None:
        await scene.verdict(Verdict(fate, "its reason"))

    scene, qemu, error = run(tmp_path, monkeypatch, destination, answered=True)
    assert isinstance(error, LostError) and "its reason" in str(error)
    assert str(scene.ram) in str(error) and scene.ram.exists()
    assert (tmp_path / "migrate/vm1.json").exists()
    assert "cont" not in qemu.heard(), "it does not run here either"


def test_a_commit_that_never_arrived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def destination(scene: Scene) -> None:
        await scene.verdict(Verdict(Fate.ABORTED, "its QEMU died"))

    scene, qemu, error = run(tmp_path, monkeypatch, destination, answered=False)
    assert isinstance(error, UmemError) and error.exit_status == 1
    assert "never got COMMIT: its QEMU died" in str(error)
    assert scene.said[-1] == "vm1 runs on at the source"
    assert "query-status" in qemu.heard() and scene.qemu_ended is None
    assert not (tmp_path / "migrate/vm1.json").exists() and scene.ram.exists()


def test_a_migration_that_was_killed_before_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The destination is not even asked."""

    async def destination(_scene: Scene) -> None:
        pass

    scene, qemu, error = run(tmp_path, monkeypatch, destination, answered=False, committed=False)
    assert isinstance(error, UmemError) and "never left" in str(error)
    assert scene.said == ["vm1 runs on at the source"]
    assert "query-status" in qemu.heard() and scene.qemu_ended is None
    assert not (tmp_path / "migrate/vm1.json").exists() and scene.ram.exists()


def test_only_what_is_missing_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through real workers; a lane that is cut in the middle costs another recovery."""
    cached = [page % 2 == 0 for page in range(NPAGES)]
    came: list[int] = []

    async def pages(link: AsyncLink, at_most: int) -> None:
        while at_most and (frame := await link.receive()):
            header, payload = frame
            if header.kind is Kind.END:
                return
            ranges, at = [(header.pgoff, header.count)], 0
            if header.kind is Kind.SCATTERED:
                at = wire.scattered_ranges_size(header, "ram")
                ranges = wire.unpack_scattered(header, payload[:at], "ram", NPAGES, PAGE)
            else:
                assert header.kind is Kind.PAGES
            missing = [page for first, nr in ranges for page in range(first, first + nr)]
            for index, page in enumerate(missing):
                assert payload[at + index * PAGE] == 1 + page % 255
                assert not cached[page], f"page {page} was there"
                cached[page] = True
                came.append(page)
            at_most -= 1

    async def one_life(scene: Scene, at_most: int) -> AsyncLink:
        control = await scene.verdict(Verdict(Fate.HERE))
        await tell_have(control, [cast("Area", FakeArea(cached))])
        lanes: dict[Lane, AsyncLink] = {}
        while len(lanes) < 2:
            link, lane = await scene.connection()
            await welcome(link, b"", scene.hello)
            lanes[lane] = link
        if not came:
            await lanes[Lane.URGENT].send(wire.pack_offsets(Kind.REQUEST, 0, [101]))
            await pages(lanes[Lane.URGENT], 1)
            assert came == [101]
            scene.migration.set_background(True)
        await pages(lanes[Lane.BACKGROUND], at_most)
        if at_most < NPAGES:
            lanes[Lane.BACKGROUND].close()
        scene.open = [control, *lanes.values()]
        return control

    async def destination(scene: Scene) -> None:
        await one_life(scene, 1)
        assert not all(cached), "the first lane brought all of it"
        control = await one_life(scene, NPAGES)
        assert all(cached)
        await control.send_json(Kind.COMPLETE, {"requests": 2})
        while (frame := await control.receive()) and frame[0].kind is not Kind.BYE:
            assert frame[0].kind is Kind.PING
        for link in scene.open:
            link.close()

    scene, _, report = run(tmp_path, monkeypatch, destination)
    assert isinstance(report, Report), report
    assert (report.state, report.recoveries, report.requests) == (State.COMPLETED, 2, 2)
    assert sorted(came) == list(range(1, NPAGES, 2)), "each page once"
    told: dict[str, Any] = scene.migration.to_json()
    assert told["pages_done"] == NPAGES


def test_pages_flow_though_nothing_can_be_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, _record: object) -> None:
        raise UmemError(f"{path}: No space left on device")

    async def destination(scene: Scene) -> None:
        monkeypatch.setattr(runtime, "write_record", full)
        link = await scene.verdict(Verdict(Fate.HERE))
        await tell_have(link, [cast("Any", FakeArea([False] * NPAGES))])
        lanes = {}
        for _ in range(2):
            lane, kind = await scene.connection()
            await welcome(lane, b"", scene.hello)
            lanes[kind] = lane
        request = wire.pack_offsets(Kind.REQUEST, 0, [0])
        await lanes[Lane.URGENT].send(request)
        async with asyncio.timeout(20):
            frame = await lanes[Lane.URGENT].receive()
        assert frame is not None and frame[0].kind in (Kind.PAGES, Kind.ZERO)
        await link.send_json(Kind.COMPLETE, {})
        while await link.receive():
            pass

    scene, _, report = run(tmp_path, monkeypatch, destination, answered=False)
    assert isinstance(report, Report) and report.state is State.COMPLETED
    assert any("No space left" in line for line in scene.said)


@pytest.mark.parametrize("word", ["SIGTERM", "Ctrl-C"])
def test_taking_the_vm_back_is_not_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    """Also in the process that sent it: from COMMIT on nothing cancels what it does."""
    monkeypatch.setenv("UMEM_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(serving, "_FIRST_RETRY_S", 0.01)
    scene = Scene(tmp_path, answered=False, committed=True)

    async def main(qemu: FakeQemu) -> None:
        record = scene.record(qemu)
        plan = Plan(qemu.qmp, record.address, Security(), background=False)
        migration = Migration(plan, scene.said.append)
        migration._session_id, migration.vm, migration._record = record.session, "vm1", record
        migration._was_running, migration.state = True, State.POSTCOPY_PAUSED
        migration._take_ram(list(record.ram))
        migration._ram_fds.append(serving.hold_ram(record.ram[0]))
        migration._make_claims()
        os.kill(qemu.process.pid, signal.SIGSTOP)

        async def life(stack: contextlib.AsyncExitStack) -> None:
            del stack

        async def after_commit() -> None:
            await migration._until_complete(migration._take_up())

        monkeypatch.setattr(migration, "_until_commit", life)
        monkeypatch.setattr(migration, "_after_commit", after_commit)
        running = asyncio.create_task(migration.run())
        await scene.verdict(Verdict(Fate.ABORTED, "lost before COMMIT"))
        async with asyncio.timeout(20):
            while migration.state is not State.FAILED:
                await asyncio.sleep(0.01)
        migration.interrupt(word)
        with pytest.raises(UmemError, match="never got COMMIT"):
            await asyncio.wait_for(running, 60)
        assert not record.path.exists(), "it is taken back"

    with scene.listener, fake_qemu(tmp_path, scene.ram, answers=ANSWERS) as qemu:
        asyncio.run(main(qemu))
    assert any("being continued here" in line for line in scene.said)


def test_a_vm_whose_qemu_is_gone_is_not_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def destination(scene: Scene) -> None:
        assert scene.qemu is not None
        scene.qemu.process.kill()
        scene.qemu.process.wait()
        await scene.verdict(Verdict(Fate.ABORTED, "lost before COMMIT"))

    scene, _, error = run(tmp_path, monkeypatch, destination, answered=False)
    assert isinstance(error, UmemError) and "never got COMMIT" in str(error)
    assert not list((tmp_path / "migrate").glob("*.json"))
    assert any("is gone" in line for line in scene.said)
