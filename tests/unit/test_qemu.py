# SPDX-License-Identifier: GPL-2.0-or-later
"""Who answers on a QMP socket, and how its process is ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from pyumem.errors import CheckError, QemuError
from pyumem.qemu import Qemu
from tests.unit.fake_qemu import fake_qemu
from tests.unit.fakes import open_descriptors


def with_qemu(path: Path, work: Callable[[Qemu], Awaitable[None]]) -> None:
    async def main() -> None:
        qemu = await Qemu.connect_when_there(path, 20)
        try:
            await work(qemu)
        finally:
            await qemu.close()

    asyncio.run(main())


@pytest.fixture
def ram(tmp_path: Path) -> Path:
    path = tmp_path / "ram0"
    path.write_bytes(bytes(8192))
    return path


def identify(qemu: Qemu, ram: Path) -> None:
    fd = os.open(ram, os.O_RDONLY)
    try:
        qemu.identify({"ram0": fd})
    finally:
        os.close(fd)


def test_one_that_does_not_hear_is_killed(tmp_path: Path, ram: Path) -> None:
    async def work(qemu: Qemu) -> None:
        identify(qemu, ram)
        assert await qemu.end(0.2)

    with fake_qemu(tmp_path, ram, deaf=True) as fake:
        with_qemu(fake.qmp, work)
        assert fake.process.wait(10) < 0


def test_one_that_hears_ends_by_itself(tmp_path: Path, ram: Path) -> None:
    async def work(qemu: Qemu) -> None:
        identify(qemu, ram)
        assert await qemu.end()

    with fake_qemu(tmp_path, ram) as fake:
        with_qemu(fake.qmp, work)
        assert fake.process.wait(10) == 0


def test_a_proxy_is_refused_and_never_signalled(
    tmp_path: Path, ram: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process behind the socket is not QEMU: it passes on what is said, or does not."""

    async def work(qemu: Qemu) -> None:
        with pytest.raises(CheckError, match=r"ram0: process \d+.*not QEMU but a proxy"):
            identify(qemu, ram)
        with pytest.raises(QemuError, match="not known to be QEMU"):
            qemu.freeze()
        assert not await qemu.end(0.1)

    monkeypatch.setattr("pyumem.qemu._QUIT_S", 0.1)
    with fake_qemu(tmp_path, deaf=True) as fake:
        with_qemu(fake.qmp, work)
        assert "quit" in fake.heard(), "asked it was"
        assert fake.process.poll() is None


def test_ram_that_was_replaced_is_not_the_vms(tmp_path: Path, ram: Path) -> None:
    async def work(qemu: Qemu) -> None:
        ram.unlink()
        ram.write_bytes(bytes(8192))
        with pytest.raises(CheckError, match="the file was replaced"):
            identify(qemu, ram)

    with fake_qemu(tmp_path, ram) as fake:
        with_qemu(fake.qmp, work)


def test_ram_on_a_device_is_open_there(tmp_path: Path) -> None:
    """A node of the driver is mapped under another inode than its own."""

    async def work(qemu: Qemu) -> None:
        identify(qemu, Path("/dev/null"))
        with pytest.raises(CheckError, match="not QEMU but a proxy"):
            identify(qemu, Path("/dev/full"))

    with fake_qemu(tmp_path) as fake:
        with_qemu(fake.qmp, work)


@pytest.mark.parametrize("impatient", [True, False])
def test_a_connection_that_is_given_up_leaves_no_descriptor(
    tmp_path: Path, impatient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        for _ in range(3):
            with contextlib.suppress(CheckError, TimeoutError):
                async with asyncio.timeout(0.1 if impatient else 10):
                    await Qemu.connect(tmp_path / "qmp.sock")

    monkeypatch.setattr("pyumem.qemu._GREETING_S", 10 if impatient else 0.1)
    with fake_qemu(tmp_path, mute_s=60):
        before = open_descriptors()
        asyncio.run(main())
        assert open_descriptors() == before


@pytest.mark.parametrize("refused", [False, True])
def test_qemu_is_given_a_socket_to_migrate_into(tmp_path: Path, refused: bool) -> None:
    async def work(qemu: Qemu) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            if refused:
                with pytest.raises(QemuError, match="refused migrate"):
                    await qemu.migrate_into(theirs)
            else:
                await qemu.migrate_into(theirs)

    with fake_qemu(tmp_path, refuses=["migrate"] if refused else []) as fake:
        with_qemu(fake.qmp, work)
        asked = [command for command in fake.heard() if command != "qmp_capabilities"]
    assert asked == ["getfd", "migrate", *(["closefd"] if refused else [])]
