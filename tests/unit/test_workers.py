# SPDX-License-Identifier: GPL-2.0-or-later
"""Worker processes: how they start, fail, are killed and stopped; none is left as a zombie."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from pyumem import wire
from pyumem.claims import ClaimMap, Slots
from pyumem.compression import directory
from pyumem.errors import WorkerError
from pyumem.lanes.compress import Unpacker
from pyumem.ram import PAGE_SIZE
from pyumem.stats import StatsBlock
from pyumem.workers import Worker, stop_all
from tests.unit.fakes import open_descriptors

PAGES = 4


class Scene:
    """A background lane of the source with everything that it is handed."""

    def __init__(self, directory: Path) -> None:
        self.ram = directory / "ram0"
        self.ram.write_bytes(b"x" * PAGES * PAGE_SIZE)
        self.claims = ClaimMap.create(Slots([PAGES]))
        self.sock, self.peer = socket.socketpair()
        self.failed: list[str] = []
        self.compression: dict[str, str] | None = None
        self.worker = Worker("lane 0 of vm1", StatsBlock.create("test"), self._on_failure)

    def _on_failure(self, _worker: Worker, reason: str) -> None:
        self.failed.append(reason)

    async def start(self, size: int = PAGES * PAGE_SIZE) -> None:
        with self.ram.open("rb") as ram:
            message = {
                "peer": "p",
                "index": 0,
                "background_lanes": 1,
                "areas": [{"id": "ram0", "size_bytes": size}],
                "compression": self.compression,
                "tls": None,
            }
            fds = [self.sock.fileno(), self.claims.memory.fd, ram.fileno()]
            await self.worker.start("source_background", message, fds)

    def close(self) -> None:
        self.sock.close()
        self.peer.close()
        self.claims.close()
        self.worker.close()


def run(work: Callable[[Scene], Awaitable[None]]) -> None:
    async def main() -> None:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
            scene = Scene(Path(directory))
            try:
                await work(scene)
            finally:
                await stop_all([scene.worker])
                pid = scene.worker.pid
                scene.close()
            assert not pid or not Path(f"/proc/{pid}").exists(), "a process is left"

    before = open_descriptors()
    asyncio.run(main())
    assert open_descriptors() == before, "a descriptor is left"


async def until(what: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not what():
            await asyncio.sleep(0.02)


def test_a_worker_works_and_counts() -> None:
    async def work(scene: Scene) -> None:
        await scene.start()
        scene.sock.close()
        assert scene.worker.totals().pages == 0, "nothing moves before go"
        scene.worker.command("go")
        await until(lambda: scene.worker.totals().pages == PAGES)
        assert scene.claims.claimed() == PAGES
        assert not scene.failed

    run(work)


def test_a_worker_without_site_packages_gets_the_one_library_that_it_needs() -> None:
    async def work(scene: Scene) -> None:
        scene.compression = {"directory": directory(), "wish": "on"}
        await scene.start()
        scene.worker.command("go")
        await until(lambda: scene.worker.totals().pages == PAGES)
        totals = scene.worker.totals()
        assert totals.bytes_before == PAGES * PAGE_SIZE
        assert 0 < totals.bytes_after < totals.bytes_sent < PAGE_SIZE
        header = wire.unpack(scene.peer.recv(wire.HEADER_SIZE))
        assert header.kind is wire.Kind.PACKED and header.length == totals.bytes_after
        pages = memoryview(bytearray(PAGES * PAGE_SIZE))
        Unpacker(directory()).unpack(memoryview(scene.peer.recv(header.length)), pages)
        assert pages == b"x" * PAGES * PAGE_SIZE

    run(work)


def test_a_library_that_is_not_there_is_told() -> None:
    async def work(scene: Scene) -> None:
        scene.compression = {"directory": "/nowhere", "wish": "on"}
        with pytest.raises(WorkerError, match="/nowhere: cannot be loaded"):
            await scene.start()

    run(work)


def test_a_killed_worker_is_noticed() -> None:
    async def work(scene: Scene) -> None:
        await scene.start()
        os.kill(scene.worker.pid, signal.SIGKILL)
        await until(lambda: scene.failed)
        (reason,) = scene.failed
        assert reason == f"lane 0 of vm1: process {scene.worker.pid} was killed by SIGKILL"

    run(work)


def test_a_lost_peer_is_told_with_the_workers_words() -> None:
    async def work(scene: Scene) -> None:
        await scene.start()
        scene.sock.close()
        scene.peer.close()
        await until(lambda: scene.failed)
        assert "lane 0 of vm1: p: the destination closed a background lane" in scene.failed[0]

    run(work)


def test_a_worker_that_cannot_begin() -> None:
    async def work(scene: Scene) -> None:
        with pytest.raises(WorkerError, match=r"lane 0 of vm1: RAM block ram0.*QEMU says"):
            await scene.start(size=(PAGES + 1) * PAGE_SIZE)
        assert not scene.failed, "told once"

    run(work)


def test_a_worker_that_gets_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(*_words: str, **_more: object) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    async def work(scene: Scene) -> None:
        monkeypatch.setattr(asyncio, "create_subprocess_exec", nothing)
        with pytest.raises(WorkerError, match=r"lane 0 of vm1: cannot be started: Resource"):
            await scene.start()

    run(work)


def test_stop_is_no_failure_and_may_come_twice() -> None:
    async def work(scene: Scene) -> None:
        await scene.start()
        await scene.worker.stop()
        await scene.worker.stop()
        await asyncio.sleep(0.05)
        assert not scene.failed
        scene.worker.command("go")  # to nobody, without an error

    run(work)


def test_stop_before_the_start() -> None:
    async def work(scene: Scene) -> None:
        await scene.worker.stop()

    run(work)


PARENT = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.unit.test_workers import Scene
async def main():
    scene = Scene(Path({directory!r}))
    await scene.start()
    print(scene.worker.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


def test_a_worker_dies_with_its_parent(tmp_path: Path) -> None:
    script = PARENT.format(root=str(Path(__file__).parents[2]), directory=str(tmp_path))
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        # It is nobody's child here; init, or whoever stands in for it, reaps it.
        if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            break
        time.sleep(0.02)
    else:
        assert not Path(f"/proc/{pid}").exists()
