# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM that is expected: what happens to its QEMU when there will be no VM."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pyumem import incoming
from pyumem.address import Address
from pyumem.area import Area
from pyumem.control import Asker
from pyumem.destination import Phase
from pyumem.errors import UmemError
from pyumem.hello import AreaSpec, Hello, Lane
from pyumem.incoming import IncomingRequest, IncomingVm
from pyumem.incoming_record import IncomingRecord, left_behind
from pyumem.process import ProcessName
from pyumem.qemu import DESTINATION_CAPABILITIES, Qemu
from pyumem.recovery import Fate
from pyumem.tls import Security
from pyumem.uapi import PAGE_SIZE
from pyumem.verdicts import Verdicts
from tests.unit.fake_qemu import FakeQemu, fake_qemu
from tests.unit.fakes import open_descriptors

SIZE = 2 * PAGE_SIZE
ANSWERS = {
    "query-migrate-capabilities": [
        {"capability": name, "state": False} for name in DESTINATION_CAPABILITIES
    ]
}


@dataclass
class Info:
    mapped: bool
    nr_cached: int = 0
    granule_size: int = PAGE_SIZE


class FakeArea:
    """An area whose backing file is that which the fake QEMU maps."""

    def __init__(self, ram: Path) -> None:
        self.name, self.size, self.node = "vm1.ram0", SIZE, "/dev/umem7"
        self.shmem_fd = os.open(ram, os.O_RDWR)
        self.mapped = False

    def info(self) -> Info:
        return Info(self.mapped)

    def close(self) -> None:
        os.close(self.shmem_fd)


class Launcher(Asker):
    """The launcher's connection."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()  # type: ignore[misc]
        self.told: list[tuple[str, dict[str, Any]]] = []

    def tell(self, event: str, **more: object) -> None:
        self.told.append((event, more))

    def dismiss(self) -> None:
        self.gone.set()


@dataclass
class Scene:
    vm: IncomingVm
    launcher: Launcher
    area: FakeArea
    life: asyncio.Task[None]


@pytest.fixture
def ram(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "ram0"
    path.write_bytes(bytes(SIZE))
    monkeypatch.setattr(incoming, "_END_PATIENCE_S", 0.2)
    return path


def run(
    tmp_path: Path,
    ram: Path,
    monkeypatch: pytest.MonkeyPatch,
    work: Callable[[Scene], Awaitable[None]],
) -> None:
    async def main() -> None:
        area, launcher = FakeArea(ram), Launcher()
        monkeypatch.setattr(Area, "create", lambda _name, _size, **_: area)
        request = IncomingRequest(
            name="vm1",
            address=Address("127.0.0.1", 0),
            blocks=(AreaSpec("ram0", SIZE, PAGE_SIZE),),
            qmp=tmp_path / "qmp.sock",
            incoming=tmp_path / "incoming.sock",
            autostart=True,
            touch=False,
        )
        vm = IncomingVm(request, Security(), launcher, None, Verdicts())
        await vm.open()
        life = asyncio.create_task(vm.run())
        try:
            await work(Scene(vm, launcher, area, life))
        finally:
            life.cancel()
            await asyncio.gather(life, return_exceptions=True)

    before = open_descriptors()
    asyncio.run(main())
    assert open_descriptors() == before, "a descriptor is left"


async def until(what: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not what():
            await asyncio.sleep(0.01)


def test_a_daemon_that_stops_says_so(
    tmp_path: Path, ram: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the phase in which it does not know its QEMU yet, the launcher alone can end it."""

    async def work(scene: Scene) -> None:
        await asyncio.sleep(0.05)
        scene.life.cancel()
        await asyncio.wait({scene.life})
        assert scene.launcher.told == [("given-up", {"reason": "umemctl serve stops"})]
        assert scene.launcher.gone.is_set()

    run(tmp_path, ram, monkeypatch, work)


def test_a_launcher_that_left_in_order_is_not_waited_for(
    tmp_path: Path, ram: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(scene: Scene) -> None:
        scene.launcher.gone.set()
        await asyncio.wait_for(scene.life, 5)

    run(tmp_path, ram, monkeypatch, work)


def test_a_qemu_without_its_launcher_is_ended(
    tmp_path: Path, ram: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(scene: Scene) -> None:
        scene.area.mapped = True
        scene.launcher.gone.set()
        await asyncio.sleep(0.1)
        assert not scene.life.done()
        with fake_qemu(tmp_path, ram, answers=ANSWERS, deaf=True) as fake:
            await asyncio.wait_for(scene.life, 20)
            assert fake.process.wait(10) < 0
            assert "migrate-incoming" not in fake.heard()

    run(tmp_path, ram, monkeypatch, work)


def test_a_qemu_that_cannot_be_used_is_ended_with_the_reason(
    tmp_path: Path, ram: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(scene: Scene) -> None:
        answers = {
            "query-migrate-capabilities": [],
            "query-version": {"qemu": {"major": 4, "minor": 1, "micro": 0}},
        }
        with fake_qemu(tmp_path, ram, answers=answers) as fake:
            await asyncio.wait_for(scene.life, 20)
            fake.process.wait(10)
        ((event, more),) = scene.launcher.told
        assert event == "given-up" and "does not know the migration capability" in more["reason"]

    run(tmp_path, ram, monkeypatch, work)


def test_a_qemu_that_ends_while_it_waits_ends_by_itself(
    tmp_path: Path, ram: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its launcher reports QEMU's own status then."""

    async def work(scene: Scene) -> None:
        with fake_qemu(tmp_path, ram, answers=ANSWERS) as fake:
            await until(lambda: scene.vm.state == "waiting")
            fake.process.terminate()
            fake.process.wait()
            await asyncio.wait_for(scene.life, 20)
        assert not scene.launcher.told

    run(tmp_path, ram, monkeypatch, work)


def test_a_qemu_that_answers_in_the_instant_of_the_end_is_ended(
    tmp_path: Path, ram: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = Qemu.connect_when_there

    async def work(scene: Scene) -> None:
        async def and_stop(path: Path, seconds: float) -> Qemu:
            qemu = await connect(path, seconds)
            scene.life.cancel()
            return qemu

        monkeypatch.setattr(Qemu, "connect_when_there", and_stop)
        with fake_qemu(tmp_path, ram, answers=ANSWERS) as fake:
            await asyncio.wait({scene.life}, timeout=20)
            assert fake.process.wait(10) == 0, "it was told to quit"

    run(tmp_path, ram, monkeypatch, work)


# --- a daemon was killed after COMMIT, before `cont` ---


class WholeArea(FakeArea):
    """One whose pages are all here."""

    def info(self) -> Any:  # noqa: ANN401
        return SimpleNamespace(complete=True, mapped=True, nr_cached=2, granule_size=PAGE_SIZE)

    def make_anonymous(self) -> None:
        """Nothing to do."""


@pytest.fixture
def adopt(
    tmp_path: Path, ram: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Awaitable[IncomingVm]]:
    """Return a function that adopts a VM which a QEMU that it is given has."""
    monkeypatch.setenv("UMEM_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(Area, "reattach", lambda _number: WholeArea(ram))
    monkeypatch.setattr(incoming, "_POLL_PAUSED_S", 0.1)
    monkeypatch.setattr(incoming, "_START_AGAIN_S", 0.1)

    async def do(qemu: FakeQemu, verdicts: Verdicts) -> IncomingVm:
        areas = (AreaSpec("ram0", SIZE, PAGE_SIZE),)
        record = IncomingRecord(
            name="vm1",
            listen="tcp:127.0.0.1:1",
            phase=Phase.COMMITTED_RUN,
            hello=Hello(Lane.CONTROL, "0" * 32, "vm1", "ab" * 32, "umem", areas=areas),
            qmp=str(qemu.qmp),
            incoming="/in",
            qemu=ProcessName.of(qemu.process.pid),
            autostart=True,
            touch=False,
            areas=areas,
            area_ids=(3,),
        )
        record.write()
        monkeypatch.setattr(incoming, "listen", lambda _address: [])
        vm = await IncomingVm.adopt(record, Security(), None, verdicts)
        assert vm is not None
        return vm

    return do


def test_a_vm_that_is_to_run_is_not_complete_before_it_does(
    tmp_path: Path, ram: Path, adopt: Callable[..., Awaitable[IncomingVm]]
) -> None:
    """Its main loop answers late: the source must not be told that it may forget, before."""

    async def main(qemu: FakeQemu) -> None:
        verdicts = Verdicts()
        vm = await adopt(qemu, verdicts)
        life = asyncio.create_task(vm.run())
        await asyncio.sleep(0.7)
        assert not life.done() and verdicts.of("0" * 32) is None
        await asyncio.wait_for(life, 20)
        assert "cont" in qemu.heard()
        verdict = verdicts.of("0" * 32)
        assert verdict is not None and verdict.fate is Fate.COMPLETE

    with fake_qemu(tmp_path, ram, mute_s=1.5) as qemu:
        asyncio.run(main(qemu))


def test_a_vm_that_cannot_be_continued_is_left_to_the_next_daemon(
    tmp_path: Path, ram: Path, adopt: Callable[..., Awaitable[IncomingVm]]
) -> None:
    async def main(qemu: FakeQemu) -> None:
        verdicts = Verdicts()
        vm = await adopt(qemu, verdicts)
        life = asyncio.create_task(vm.run())
        await asyncio.sleep(0.7)
        life.cancel()
        await asyncio.gather(life, return_exceptions=True)
        assert verdicts.of("0" * 32) is None
        (left,) = left_behind()
        assert left.phase is Phase.COMMITTED_RUN

    with fake_qemu(tmp_path, ram, refuses=["cont"]) as qemu:
        asyncio.run(main(qemu))


def test_it_is_continued_once_though_that_cannot_be_written_down(
    tmp_path: Path,
    ram: Path,
    adopt: Callable[..., Awaitable[IncomingVm]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(_record: IncomingRecord) -> None:
        raise UmemError("no space left")

    async def main(qemu: FakeQemu) -> None:
        vm = await adopt(qemu, Verdicts())
        monkeypatch.setattr(IncomingRecord, "write", full)
        await asyncio.wait_for(vm.run(), 20)
        assert qemu.heard().count("cont") == 1

    with fake_qemu(tmp_path, ram) as qemu:
        asyncio.run(main(qemu))
