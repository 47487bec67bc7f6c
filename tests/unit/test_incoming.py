# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM that is expected: what happens to its QEMU when there will be no VM."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pyumem import incoming
from pyumem.address import Address
from pyumem.area import Area
from pyumem.control import Asker
from pyumem.hello import AreaSpec
from pyumem.incoming import IncomingRequest, IncomingVm
from pyumem.qemu import DESTINATION_CAPABILITIES, Qemu
from pyumem.tls import Security
from pyumem.uapi import PAGE_SIZE
from pyumem.verdicts import Verdicts
from tests.unit.fake_qemu import fake_qemu
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
        monkeypatch.setattr(Area, "create", lambda _name, _size: area)
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
