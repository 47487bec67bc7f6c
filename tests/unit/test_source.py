# SPDX-License-Identifier: GPL-2.0-or-later
"""Decisions of the source's end that need no destination."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pyumem import source, source_base, wire
from pyumem.address import Address
from pyumem.area import Area
from pyumem.claims import UNPACED, ClaimMap, Slots
from pyumem.convergence import Limits
from pyumem.errors import CheckError, DriverError, LinkError, UmemError, of_system
from pyumem.hello import Lane
from pyumem.qemu import SOURCE_CAPABILITIES, Qemu, RamBlock
from pyumem.ram import PAGE_SIZE
from pyumem.report import State
from pyumem.source import Migration
from pyumem.source_base import Plan
from pyumem.stats import StatsBlock
from pyumem.tls import Security
from pyumem.workers import Worker
from tests.unit.fake_qemu import fake_qemu

ANSWERS = {
    "query-migrate-capabilities": [
        {"capability": name, "state": False} for name in SOURCE_CAPABILITIES
    ],
    "query-name": {"name": "vm1"},
}


class Scene:
    """A migration with lanes whose processes were never started."""

    def __init__(self, *, background: bool, background_lanes: int) -> None:
        self.said: list[str] = []
        plan = Plan(
            *(Path("/qmp"), Address("h", 1), Security()),
            background=background,
            background_lanes=background_lanes,
        )
        self.migration = Migration(plan, self.said.append)
        self.migration._claims = ClaimMap.create(Slots([100]))
        self.all_lanes = self.migration._new_lanes()
        self.broken = self.all_lanes.broken
        self.lanes = {}
        for lane in (Lane.URGENT, Lane.BACKGROUND):
            worker = Worker(lane.value, StatsBlock.create("test"), self.all_lanes.worker_failed)
            self.lanes[lane] = self.all_lanes.workers[lane, 0] = worker

    def commit(self) -> None:
        self.migration.state = State.POSTCOPY_ACTIVE
        self.all_lanes._idle_may_be_lost = True

    def lose(self, lane: Lane) -> None:
        self.all_lanes.worker_failed(self.lanes[lane], f"{lane}: lost")

    def close(self) -> None:
        for worker in self.lanes.values():
            worker.close()
        assert self.migration._claims
        self.migration._claims.close()


def run(
    work: Callable[[Scene], Awaitable[None]], *, background: bool, background_lanes: int = 1
) -> None:
    async def main() -> None:
        scene = Scene(background=background, background_lanes=background_lanes)
        try:
            await work(scene)
        finally:
            scene.close()

    asyncio.run(main())


def test_a_background_lane_that_has_not_begun_may_be_lost() -> None:
    async def work(scene: Scene) -> None:
        scene.commit()
        scene.lose(Lane.BACKGROUND)
        assert not scene.broken.done()
        assert scene.said == ["background: lost; no page is lost with it"]
        with pytest.raises(UmemError, match="pages still come on request"):
            scene.migration.set_background(True)
        scene.lose(Lane.URGENT)
        assert isinstance(scene.broken.exception(), LinkError)

    run(work, background=False)


def test_the_background_has_a_pace() -> None:
    async def work(scene: Scene) -> None:
        migration = scene.migration
        claims = migration._claims
        assert claims
        seen = []
        changes: list[Callable[[], None]] = [
            lambda: migration.set_max_bandwidth(8000),
            lambda: migration.set_background(False),
            lambda: migration.set_max_bandwidth(2),
            lambda: migration.set_background(True),
            lambda: migration.set_max_bandwidth(None),
        ]
        for change in changes:
            change()
            seen.append((migration.to_json()["background"], claims.pace))
        assert seen == [(True, 2000), (False, 0), (False, 0), (True, 1), (True, UNPACED)]

    run(work, background=True, background_lanes=4)


def test_a_background_lane_that_has_sent_all_may_be_lost() -> None:
    async def work(scene: Scene) -> None:
        scene.commit()
        scene.all_lanes.go(Lane.BACKGROUND)
        scene.lanes[Lane.BACKGROUND].drained = True
        scene.lose(Lane.BACKGROUND)
        assert not scene.broken.done()

    run(work, background=True)


def test_a_runtime_directory_that_cannot_be_made_is_an_errorof_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").write_text("")
    monkeypatch.setenv("UMEM_RUNTIME_DIR", str(tmp_path / "run"))
    ram = tmp_path / "ram0"
    ram.write_bytes(bytes(PAGE_SIZE))
    answers = {
        **ANSWERS,
        "query-status": {"status": "running"},
        "query-migrate": {},
        "qom-list": [],
        "query-memory-size-summary": {"base-memory": 0},
    }
    said: list[str] = []

    async def main() -> None:
        with pytest.raises(UmemError, match=r"cannot make .*: Not a directory"):
            await Migration(Plan(fake.qmp, Address("h", 1), Security()), said.append).run()

    with fake_qemu(tmp_path, ram, answers=answers) as fake:
        asyncio.run(main())


@pytest.mark.parametrize(
    ("state", "more"), [("paused", ""), ("postmigrate", r", in state postmigrate: .*`cont`.*")]
)
def test_a_paused_vm_that_stays_is_told_with_its_state(
    tmp_path: Path, state: str, more: str
) -> None:
    """QEMU 7.2 does not migrate it again from postmigrate, whatever we do."""
    said: list[str] = []

    async def main() -> None:
        qemu = await Qemu.connect(fake.qmp)
        await Migration(Plan(fake.qmp, Address("h", 1), Security()), said.append)._make_run(qemu)
        await qemu.close()

    with fake_qemu(tmp_path, answers={"query-status": {"status": state}}) as fake:
        asyncio.run(main())
        assert "cont" not in fake.heard()
    assert re.fullmatch(f" is paused at the source, as it was{more}", said[0])


def test_a_vm_that_runs_on_tells_the_switches(tmp_path: Path) -> None:
    async def main() -> None:
        qemu = await Qemu.connect(fake.qmp)
        migration = Migration(Plan(fake.qmp, Address("h", 1), Security()), said.append)
        migration._was_running = True
        await migration._make_run(qemu)
        await qemu.close()

    said: list[str] = []
    with fake_qemu(tmp_path, answers={"query-status": {"status": "running"}}) as fake:
        asyncio.run(main())
        assert fake.heard()[-1] == "announce-self"
    assert said == [" runs on at the source"]


def test_a_vm_in_postmigrate_is_refused_with_the_way_out(tmp_path: Path) -> None:
    answers = {
        **ANSWERS,
        "query-status": {"status": "postmigrate"},
    }

    async def main() -> None:
        with pytest.raises(CheckError, match="after `cont` at its monitor"):
            await Migration(Plan(fake.qmp, Address("h", 1), Security()), print).run()

    with fake_qemu(tmp_path, answers=answers) as fake:
        asyncio.run(main())


def test_an_error_of_the_system_is_a_line_that_names_the_file() -> None:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/run/umem/x")
    assert str(of_system(error)) == "/run/umem/x: No space left on device"
    assert str(of_system(OSError("AF_UNIX path too long"))) == "AF_UNIX path too long"


@pytest.mark.parametrize("state", [State.DEVICE, State.POSTCOPY_ACTIVE])
def test_another_lane_that_is_lost_breaks_the_migration(state: State) -> None:
    async def work(scene: Scene) -> None:
        scene.migration.state = state
        if state.committed:
            scene.all_lanes.go(Lane.BACKGROUND)
        scene.lose(Lane.BACKGROUND)
        assert isinstance(scene.broken.exception(), LinkError)

    run(work, background=state.committed)


@pytest.mark.parametrize("room", [1024, 2])
def test_device_state_is_held_until_it_may_be_loaded(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is taken off QEMU meanwhile, as far as there is room."""
    monkeypatch.setattr(source, "_HELD", room)
    state = os.urandom(5 * 32768 + 100)
    sent: list[bytes] = []

    class Fake:
        link: Any

        async def send(self, *parts: bytes | memoryview) -> None:
            sent.append(b"".join(map(bytes, parts)))

        async def wait_migration(self, *_states: str) -> None:
            pass

        def break_off(self, error: UmemError) -> None:
            raise AssertionError(error)

    async def work() -> None:
        migration = Migration(Plan(Path("/qmp"), Address("h", 1), Security()), lambda _text: None)
        fake: Any = Fake()
        fake.link = fake
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        may_load = asyncio.Event()
        relay = asyncio.create_task(migration._relay(fake, ours, fake, may_load))
        await asyncio.to_thread(theirs.sendall, state)
        theirs.close()
        await asyncio.sleep(0.05)
        assert not sent and not relay.done()
        may_load.set()
        await relay
        headers = [wire.unpack(frame[: wire.HEADER_SIZE]) for frame in sent]
        assert b"".join(frame[wire.HEADER_SIZE :] for frame in sent) == state
        assert {one.kind for one in headers[:-1]} == {wire.Kind.DEVICE}
        assert headers[-1].kind is wire.Kind.DEVICE_END
        assert migration._device_bytes == len(state)

    asyncio.run(work())


@pytest.mark.parametrize("answers", [True, False])
def test_the_background_begins_when_the_guest_runs(
    answers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a moment later: its start may wait for a page itself."""
    monkeypatch.setattr(source, "_HEAD_START_S", 0.1)
    begun: list[Lane] = []

    class Fake:
        link: Any

        def __init__(self) -> None:
            self.link = self
            self.told = {wire.Kind.RUNNING: asyncio.get_running_loop().create_future()}

        async def send_json(self, kind: wire.Kind, _message: object) -> None:
            assert kind is wire.Kind.COMMIT

        def committed(self, *, background: bool) -> None:
            assert background

        def go(self, lane: Lane) -> None:
            begun.append(lane)

    async def work() -> None:
        migration = Migration(Plan(Path("/qmp"), Address("h", 1), Security()), lambda _text: None)
        fake: Any = Fake()
        commit = asyncio.create_task(migration._commit(fake, 0.0))
        await asyncio.sleep(0.02)
        assert not begun and not commit.done()
        if answers:
            fake.told[wire.Kind.RUNNING].set_result({"running": True})
            await commit
        else:
            await asyncio.sleep(0.2)
            assert begun and not commit.done()
            fake.told[wire.Kind.RUNNING].set_result({"running": True})
            await commit
        assert begun == [Lane.BACKGROUND]

    asyncio.run(work())


def test_pre_copy_of_memory_that_is_not_whole_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A VM that arrived by post-copy, whose daemon is gone for the moment: it would lose pages."""
    migration = on_areas(monkeypatch, complete=(True, False))
    with pytest.raises(CheckError, match="ram1: /path1 lacks pages still"):
        migration._take_areas(Limits())


def test_holes_are_those_of_the_backing_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Post-copy too reads it, unless somebody else is, or ought to be, the area's server."""
    migration = on_areas(monkeypatch, complete=(True, False, True, True), busy=2, plain=3)
    migration._find_pages()
    assert migration._page_fds == [100, 11, 12, 13]
    assert len(migration._areas) == 1


def on_areas(
    monkeypatch: pytest.MonkeyPatch, *, complete: tuple[bool, ...], busy: int = -1, plain: int = -1
) -> Migration:
    """Return a migration of RAM blocks, each an area.  busy: it has a server; plain: it is none."""

    def reattach(number: int) -> object:
        assert complete[number], "its server may come back"
        if number == busy:
            raise DriverError("reattach", errno.EBUSY)
        return SimpleNamespace(granule_size=PAGE_SIZE, npages=10, shmem_fd=100 + number)

    monkeypatch.setattr(
        source_base, "area_number", lambda fd: None if fd - 10 == plain else fd - 10
    )
    monkeypatch.setattr(Area, "reattach", reattach)
    monkeypatch.setattr(Area, "look", lambda n: SimpleNamespace(complete=complete[n]))
    migration = Migration(Plan(Path("/qmp"), Address("h", 1), Security()), lambda _text: None)
    count = len(complete)
    migration._ram = [RamBlock(f"ram{n}", f"/path{n}", 10 * PAGE_SIZE) for n in range(count)]
    migration._ram_fds = [10 + n for n in range(count)]
    return migration
