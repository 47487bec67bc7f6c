# SPDX-License-Identifier: GPL-2.0-or-later
"""Pages of other sizes than 4 KiB: at either end of a migration, and in the guest."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.migration.world import (
    LAUNCHER,
    PATIENCE,
    PORT,
    World,
    alive,
    ask_qemu,
    eventually,
    report_of,
    watched,
    world,
)
from tests.shapes.test_blocks import memory_of
from tests.vm.guest import GuestSpec
from tests.vm.hosts import three_hosts

MIB = 1 << 20
# Not KVM: see Documentation/testing.rst, "A guest under KVM that is reset".
SPEC = GuestSpec(workload="verify", writers=1, mb=16, memory="96M", accel="tcg")
HUGE_PAGES = Path("/proc/sys/vm/nr_hugepages")


@contextlib.contextmanager
def mounted(point: Path, kind: str, options: str) -> Iterator[Path]:
    """A file system of its own."""
    point.mkdir()
    subprocess.run(["mount", "-t", kind, "-o", options, "none", point], check=True)
    yield point
    subprocess.run(["umount", point], check=True)


@pytest.fixture
def hugetlbfs(tmp_path: Path) -> Iterator[Path]:
    """A hugetlbfs with room for the guest, its pages of 2 MiB."""
    HUGE_PAGES.write_text(f"{96 // 2}\n")
    assert int(HUGE_PAGES.read_text()) == 96 // 2
    with mounted(tmp_path / "hugetlbfs", "hugetlbfs", "pagesize=2M") as point:
        yield point
    HUGE_PAGES.write_text("0\n")


@pytest.mark.timeout(900)
def test_three_hosts_and_four_sizes_of_pages(hugetlbfs: Path, tmp_path: Path) -> None:
    """A guest goes from A, where its RAM is huge pages, to B in granules of 64 KiB, to C in huge
    pages, and to A again in pages of 4 KiB; it works, and checks its memory, all the way.
    """
    with three_hosts() as pairs, contextlib.ExitStack() as stack:
        worlds = []
        for n, (source, destination) in enumerate(pairs):
            folder = tmp_path / f"hop{n}"
            folder.mkdir()
            worlds.append(stack.enter_context(watched(World(source, destination, folder, stack))))
        program, console = worlds[0].guest(SPEC, arguments=("-mem-path", str(hugetlbfs)))
        console.wait("tick", timeout=PATIENCE)
        name = "vm1"
        for n, (w, granule) in enumerate(zip(worlds, ("64K", "huge", "4K"), strict=True)):
            w.serve("--granule", granule)
            # All hosts share a driver, which knows an area by its name.
            to = f"vm-{n}"
            new, after = w.expect(SPEC, name=to)
            size = {"64K": 65536, "huge": 2 * MIB, "4K": 4096}[granule]
            assert w.vm(to)["areas"][0]["granule_bytes"] == size
            migrate = w.migrate("--json", vm=name)
            assert migrate.wait(300) == 0, migrate.said()
            assert program.wait() == 0
            alive(after)
            verdict = after.verdict(300)
            assert verdict.ok and verdict.bad == 0, verdict.text
            told = report_of(migrate)
            counts = [told[f"pages_{kind}"] for kind in ("demand", "background", "zero")]
            print(f"{granule}: {told['requests']} requests, pages {counts}, {told['total_s']} s")
            assert sum(counts) == 96 * 256, "each page was sent once"
            assert told["requests"] > 0
            program, name = new, to
            if n == 0:
                assert not list(hugetlbfs.iterdir()), "a file is left"
        program.end()
        eventually(lambda: worlds[0].areas() == [], why="an area was left behind")


def test_a_guest_whose_pages_are_8_kib(tmp_path: Path) -> None:
    """Alpha, which knows no smaller ones, under TCG, from a tmpfs of huge pages into granules of
    64 KiB.  What runs in it is its firmware, which echoes what is typed at the source.
    """
    line = tmp_path / "source.serial"
    alpha = ("qemu-system-alpha", "-m", "64M", "-nodefaults", "-display", "none", "-name", "vm1")
    with (
        mounted(tmp_path / "tmpfs", "tmpfs", "huge=always,size=128M,mode=700") as huge,
        world(tmp_path) as w,
    ):
        w.serve("--granule", "64K")
        monitors = [tmp_path / "source.qmp", tmp_path / "destination.qmp"]
        before = w.start(
            w.source,
            *(LAUNCHER, *alpha, "-mem-path", str(huge), "-serial", f"unix:{line},server=on"),
            *("-qmp", f"unix:{monitors[0]},server=on,wait=off"),
        )
        talk(line, "", "PCI:")
        talk(line, "hello", "got: hello")
        ask_qemu(monitors[0], "stop")
        ram = huge / "vm1" / "ram0"
        with ram.open("r+b") as file:  # what the firmware never looks at
            file.seek(16 * MIB)
            file.write(os.urandom(20 * MIB))
        content = ram.read_bytes()
        line.unlink()
        w.start(
            w.destination,
            *(LAUNCHER, *alpha, "-postcopy", "-incoming", f"tcp:0:{PORT}"),
            *("-serial", f"unix:{line},server=on,wait=off"),
            *("-qmp", f"unix:{monitors[1]},server=on,wait=off"),
        )
        eventually(lambda: w.vm().get("state") == "waiting")
        migrate = w.migrate("--json")
        assert migrate.wait(300) == 0, migrate.said()
        assert before.wait() == 0
        arrived = memory_of(w.destination.runtime / "areas" / "vm1.ram0")
        assert hashlib.sha256(arrived).digest() == hashlib.sha256(content).digest()
        assert ask_qemu(monitors[1], "query-status")["status"] == "paused"
        # Stock QEMU's alpha stays silent after any migration, also one without umem.
        ask_qemu(monitors[1], "cont")
        assert ask_qemu(monitors[1], "query-status")["status"] == "running"


def talk(line: Path, say: str, wanted: str) -> None:
    """Say something to the firmware and wait for an answer."""
    eventually(line.exists)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(str(line))
        if say:
            sock.sendall(say.encode() + b"\r")
        heard = b""
        while wanted.encode() not in heard or b">>> " not in heard.rpartition(wanted.encode())[2]:
            piece = sock.recv(4096)
            assert piece, heard
            heard += piece
