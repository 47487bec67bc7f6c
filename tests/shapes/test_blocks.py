# SPDX-License-Identifier: GPL-2.0-or-later
"""Machines of other shapes than one RAM block of one VM: NUMA nodes and a DIMM, many VMs."""

import contextlib
import json
import mmap
import os
import random
import sys
import time
from pathlib import Path

from pyumem.control import ControlClient
from pyumem.hello import AreaSpec
from tests.migration.world import (
    LAUNCHER,
    PATIENCE,
    PORT,
    alive,
    ask_qemu,
    eventually,
    report_of,
    world,
)
from tests.vm.guest import GuestSpec
from tests.vm.hosts import Host

MIB = 1 << 20


def memory_of(area: Path) -> bytes:
    """The content of an area of which all is there; its file is for mapping, not for reading."""
    with area.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
        return memory[:]


def test_numa_nodes_and_a_hot_plugged_dimm(tmp_path: Path) -> None:
    """Three RAM blocks, the third plugged in at the source, and on its command line nowhere.

    The guest's array is larger than what it booted with.
    """
    nodes = [
        word
        for n in (0, 1)
        for word in (
            *("-object", f"memory-backend-{('ram', 'memfd')[n]},id=m{n},size=48M"),
            *("-numa", f"node,nodeid={n},cpus={n},memdev=m{n}"),
        )
    ]
    spec = GuestSpec(
        workload="verify",
        writers=2,
        mb=64,
        vcpus=2,
        memory="96M,slots=2,maxmem=1G",
        # Not KVM: see Documentation/testing.rst, "A guest under KVM that is reset".
        accel="tcg",
        virtio=True,
        extra=tuple(nodes),
    )
    dimm_file = Path("/dev/shm/umem-src/vm1/dimm0")
    qmp = tmp_path / "source.qmp"
    serial = tmp_path / "source.serial"
    with world(tmp_path) as w:
        w.serve()
        source_qemu = w.start(
            w.source,
            *(LAUNCHER, os.environ["UMEM_QEMU"], "-name", "vm1", *spec.qemu_args(serial), "-S"),
            *("-qmp", f"unix:{qmp},server=on,wait=off"),
        )
        backend = {"qom_type": "memory-backend-file", "id": "dimm0", "size": 128 * MIB}
        ask_qemu(qmp, "object-add", **backend, mem_path=str(dimm_file), share=True)
        ask_qemu(qmp, "device_add", driver="pc-dimm", id="d0", memdev="dimm0", node=1)
        ask_qemu(qmp, "cont")
        console = w.console(serial)
        console.wait("ready", timeout=2 * PATIENCE)
        dimm = ("-object", "memory-backend-ram,id=dimm0,size=128M")
        _, after = w.expect(spec, arguments=(*dimm, "-device", "pc-dimm,id=d0,memdev=dimm0,node=1"))
        assert sorted(area.name for area in w.areas()) == ["vm1.dimm0", "vm1.m0", "vm1.m1"]
        used = dimm_file.stat().st_blocks * 512 // MIB
        print(f"{used} MiB of the DIMM are in use")
        assert used > 8
        migrate = w.migrate("--json")
        assert migrate.wait(300) == 0, migrate.said()
        told = report_of(migrate)
        assert told["pages_total"] == 224 * MIB // 4096
        assert source_qemu.wait() == 0
        alive(after)
        verdict = after.verdict(300)
        assert verdict.ok and verdict.bad == 0, verdict.text
        assert not dimm_file.parent.exists(), "the DIMM's file, and the directory, are gone"
        assert all(area.complete for area in w.areas())


def test_eight_vms_at_once(tmp_path: Path) -> None:
    """Each arrives, and each has its own memory.

    Their guests do not run: what is in their memory, the test has put there.  Of umem there is here
    what migrates, and no launcher, whose start takes seconds each.
    """
    size = 8 * MIB
    names = [f"vm{n}" for n in range(8)]

    def start(host: Host, name: str, ram: str, qmp: Path, *more: str) -> None:
        backend = f"memory-backend-file,id=ram0,size={size},share=on,mem-path={ram}"
        w.start(
            host,
            *(os.environ["UMEM_QEMU"], "-accel", "tcg", "-m", "8M", "-nodefaults"),
            *("-display", "none", "-S", "-object", backend, "-M", "memory-backend=ram0"),
            *("-name", name, "-qmp", f"unix:{qmp},server=on,wait=off", *more),
        )

    with world(tmp_path) as w, contextlib.ExitStack() as launchers:
        serve = w.serve()
        for n, name in enumerate(names):
            start(w.source, name, str(tmp_path / f"{name}.ram"), tmp_path / f"{name}.qmp")
            qmp = w.destination.runtime / f"{name}.qmp"
            client = ControlClient(w.destination.runtime / "serve.sock", timeout=PATIENCE)
            launchers.callback(client.close)
            answer = client.ask(
                "incoming",
                name=name,
                listen=f"tcp:0:{PORT + n}",
                areas=[AreaSpec("ram0", size, 4096).to_json()],
                qmp=str(qmp),
                incoming=str(w.destination.runtime / f"{name}.incoming"),
                autostart=True,
                touch=False,
            )
            start(w.destination, name, answer["areas"][0]["path"], qmp, "-incoming", "defer")
        contents = []
        for n, name in enumerate(names):
            ask_qemu(tmp_path / f"{name}.qmp", "query-status")
            # All different, beyond what the firmware would use.
            content = random.Random(n).randbytes(MIB)
            with (tmp_path / f"{name}.ram").open("r+b") as ram:
                for at in (2 * MIB + 4096 * n, 5 * MIB + 4096 * n):
                    ram.seek(at)
                    ram.write(content)
                ram.seek(0)
                contents.append(ram.read())
        eventually(
            lambda: [vm["state"] for vm in w.serve_status()["vms"]] == ["waiting"] * len(names),
            why=f"not all wait: {serve.said()}",
        )
        begun = time.monotonic()
        wanted = [f"{name}:{PORT + n}:{tmp_path}/{name}.qmp" for n, name in enumerate(names)]
        moves = w.start(
            w.source,
            *(sys.executable, "-m", "tests.migration.many", w.destination.address, *wanted),
        )
        assert moves.wait(280) == 0, moves.said()
        print(f"moved within {time.monotonic() - begun:.0f} s")
        told = json.loads(moves.said().splitlines()[-1])
        for name, content in zip(names, contents, strict=True):
            assert told[name]["state"] == "completed" and told[name]["recoveries"] == 0
            assert told[name]["pages_total"] == size // 4096
            assert memory_of(w.destination.runtime / "areas" / f"{name}.ram0") == content, name
        assert len({report["session"] for report in told.values()}) == len(names)
        for name in names:
            qmp = w.destination.runtime / f"{name}.qmp"
            # As it was at the source, where it never ran.
            assert ask_qemu(qmp, "query-status")["status"] == "prelaunch"
        assert [one["state"] for one in w.serve_status()["history"]] == ["completed"] * len(names)
