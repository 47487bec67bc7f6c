# SPDX-License-Identifier: GPL-2.0-or-later
"""Stock QEMU gives memory back: balloon, free-page reporting and virtio-mem on an area's file.

The guest boots on an area of which everything is missing and whose server has nothing but zeros, so
that it needs no source.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pyumem.area import Area
from pyumem.qemu import Qemu
from tests.vm.guest import GuestConsole, GuestSpec

from .support import PAGE, Server, wait_until

pytestmark = pytest.mark.timeout(600)

MIB = 1 << 20
RAM = 192 * MIB
TAKEN = 32 * MIB
PATIENCE = 150.0
RUN = 8
"""Pages that are marked at a time: one by one the boot would take minutes under emulation."""


@dataclass
class Machine:
    """A guest that runs on an area."""

    qmp: Path
    console: GuestConsole
    log: Path

    def ask(self, command: str, **arguments: object) -> Any:  # noqa: ANN401 - QMP's own
        async def once() -> object:
            qemu = await Qemu.connect(self.qmp)
            try:
                return await qemu.execute(command, **arguments)
            finally:
                await qemu.close()

        return asyncio.run(once())

    def wait(self, wanted: int, command: str, key: str = "", **arguments: object) -> None:
        """Ask every second, QEMU has better to do, until the answer is this number of bytes."""
        deadline = time.monotonic() + PATIENCE
        while True:
            answer = self.ask(command, **arguments)
            now = answer[key] if key else answer
            if now == wanted:
                return
            assert time.monotonic() < deadline, f"{command}: {now >> 20} of {wanted >> 20} MiB"
            time.sleep(1)


@contextlib.contextmanager
def machine(area: Area, mount: Path, tmp: Path, qemu: str, *extra: str) -> Iterator[Machine]:
    """Boot the verifying guest on the area; at the end its memory must be as it wrote it."""
    spec = GuestSpec(
        workload="verify", mb=16, memory=f"{area.size // MIB}M,maxmem=1G,slots=2", virtio=True
    )
    serial, qmp, log = tmp / "serial", tmp / "qmp", tmp / "log"
    ram = f"memory-backend-file,id=ram0,mem-path={mount / area.name},share=on,size={area.size}"
    argv = [os.environ[qemu], *spec.qemu_args(serial), "-object", ram]
    argv += ["-machine", "q35,memory-backend=ram0", *extra]
    argv += ["-qmp", f"unix:{qmp},server=on,wait=off"]
    with (
        log.open("w") as said,
        Server(area, lambda _area, _pgoff: None, run=RUN),
        subprocess.Popen(argv, stdout=said, stderr=said) as process,
        GuestConsole(serial) as console,
    ):
        try:
            console.wait("ready", timeout=PATIENCE)
            yield Machine(qmp, console, log)
            verdict = console.verdict()
        finally:
            process.kill()
    assert verdict.ok, verdict.text
    # QEMU complains of what it could not give back, and goes on.
    assert log.read_text() == ""


@pytest.fixture
def ram() -> Iterator[Area]:
    with Area.create("ram", RAM) as area:
        yield area


@pytest.mark.parametrize(
    "qemu", ["UMEM_QEMU", pytest.param("UMEM_QEMU10", marks=pytest.mark.one_kernel)]
)
def test_balloon(ram: Area, mount: Path, tmp_path: Path, qemu: str) -> None:
    with machine(ram, mount, tmp_path, qemu, "-device", "virtio-balloon-pci") as vm:
        before = ram.stats().nr_discarded
        assert not ram.info().complete
        vm.ask("balloon", value=RAM - TAKEN)
        vm.wait(RAM - TAKEN, "query-balloon", "actual")
        # Most of what it took the guest had never touched: it was missing, and stays unfetched.
        assert ram.stats().nr_discarded - before > TAKEN // 8 // PAGE
        assert os.fstat(ram.shmem_fd).st_blocks * 512 <= RAM - TAKEN
        vm.ask("balloon", value=RAM)
        vm.wait(RAM, "query-balloon", "actual")


@pytest.mark.one_kernel
def test_free_page_reporting(mount: Path, tmp_path: Path) -> None:
    """The guest tells of free memory by itself, in blocks of 2 MiB and while it has 64 MiB more."""
    device = ("-device", "virtio-balloon-pci,free-page-reporting=on")
    with (
        Area.create("ram", 512 * MIB) as ram,
        machine(ram, mount, tmp_path, "UMEM_QEMU", *device),
    ):
        wait_until(
            lambda: ram.stats().nr_discarded > 128 * MIB // PAGE,
            "free memory that was missing is reported, and stays unfetched",
            PATIENCE,
        )


@pytest.mark.one_kernel
def test_virtio_mem(ram: Area, mount: Path, tmp_path: Path) -> None:
    size = 128 * MIB
    with (
        Area.create("plugged", size) as plugged,
        # Page by page: neighbours that are marked too would not be counted as given back.
        Server(plugged, lambda _area, _pgoff: None),
    ):
        memory = f"memory-backend-file,id=m,mem-path={mount / 'plugged'},share=on,size={size}"
        device = "virtio-mem-pci,id=vm0,memdev=m,requested-size=0"
        extra = ("-object", memory, "-device", device)
        with machine(ram, mount, tmp_path, "UMEM_QEMU10", *extra) as vm:

            def plug(wanted: int) -> None:
                where = {"path": "/machine/peripheral/vm0"}
                vm.ask("qom-set", **where, property="requested-size", value=wanted)
                vm.wait(wanted, "qom-get", **where, property="size")

            # QEMU begins by giving all of it back.
            wait_until(lambda: plugged.info().complete, "all of it is given back", PATIENCE)
            assert plugged.stats().nr_discarded == size // PAGE
            plug(size)
            plug(0)
            assert os.fstat(plugged.shmem_fd).st_blocks * 512 < MIB
