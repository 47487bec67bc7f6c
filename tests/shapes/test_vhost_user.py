# SPDX-License-Identifier: GPL-2.0-or-later
"""A vhost-user back end: another process that maps the guest's RAM, and touches what is missing of
it, stock qemu-storage-daemon with stock QEMU.
"""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path

from tests.migration.world import (
    LAUNCHER,
    PATIENCE,
    PORT,
    Program,
    World,
    eventually,
    report_of,
    world,
)
from tests.vm.guest import GuestConsole, GuestSpec
from tests.vm.hosts import Host

MIB = 1 << 20
# Not KVM: see Documentation/testing.rst, "A guest under KVM that is reset".
SPEC = GuestSpec(workload="shell", memory="96M", virtio=True, accel="tcg")
COPY = 4 * MIB


class Machine:
    """A guest with a disk behind qemu-storage-daemon, and a shell on its serial line."""

    def __init__(self, w: World, host: Host, disk: Path, *more: str) -> None:
        self.serial = w.tmp / f"{host.name}.serial"
        at = w.tmp / f"{host.name}.vhost"
        blockdev = f"driver=file,node-name=disk,filename={disk},locking=off"
        export = "type=vhost-user-blk,id=export,node-name=disk,writable=on"
        self.storage = w.start(
            host,
            *("qemu-storage-daemon", "--blockdev", blockdev),
            *("--export", f"{export},addr.type=unix,addr.path={at}"),
        )
        eventually(at.exists)
        self.qemu: Program = w.start(
            host,
            *(LAUNCHER, os.environ["UMEM_QEMU"], "-name", "vm1", *SPEC.qemu_args(self.serial)),
            *("-chardev", f"socket,id=blk,path={at}", "-device", "vhost-user-blk-pci,chardev=blk"),
            *more,
        )
        self.console: GuestConsole = w.console(self.serial)

    def run(self, command: str) -> str:
        """Run a command in the guest; what it prints has to be one word."""
        since = self.console.mark()
        self.console.send(f"echo UMEM-GUEST answer $({command})")
        told = self.console.wait("answer", timeout=PATIENCE, since=since)
        assert len(told.words) == 1, told.text
        return told.words[0]

    def major_faults(self) -> int:
        """How often the storage daemon has waited for a page."""
        fields = Path(f"/proc/{self.storage.process.pid}/stat").read_text().rpartition(")")[2]
        return int(fields.split()[9])


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def test_a_disk_behind_a_storage_daemon(tmp_path: Path) -> None:
    """It writes what it reads into missing pages, and reads missing pages to write them."""
    disk = tmp_path / "disk"
    content = random.Random(1).randbytes(8 * MIB)
    disk.write_bytes(content)
    all_of_it = "/bin/busybox cat /dev/vda | /bin/busybox md5sum | /bin/busybox cut -c1-32"
    with world(tmp_path) as w:
        w.serve()
        source = Machine(w, w.source, disk)
        lines = source.console.other_lines
        # What is said to it earlier comes back as an echo.
        eventually(lambda: any("Enter 'help'" in line for line in lines), 4 * PATIENCE)
        assert source.run(all_of_it) == md5(content)
        source.run(f"/bin/busybox head -c {COPY} /dev/vda >/copy; echo ok")
        destination = Machine(w, w.destination, disk, "-postcopy", "-incoming", f"tcp:0:{PORT}")
        eventually(lambda: w.vm().get("state") == "waiting")
        migrate = w.migrate("-n", "--json")
        migrate.wait_said("vm1 runs at")
        before = destination.major_faults()
        destination.run("echo 3 >/proc/sys/vm/drop_caches; echo ok")
        assert destination.run(all_of_it) == md5(content)
        copied = "/bin/busybox dd if=/copy of=/dev/vda bs=65536 seek=64 2>/dev/null; sync; echo ok"
        assert destination.run(copied.replace("sync", "/bin/busybox sync")) == "ok"
        waited = destination.major_faults() - before
        print(f"qemu-storage-daemon had {waited} major faults; {w.vm()['areas']}")
        assert waited > 50, "it touched nothing that was missing"
        assert w.vm()["state"] == "postcopy-active"
        done = w.source.run(["umemctl", "background", "vm1"])
        assert done.returncode == 0, done.stderr
        assert migrate.wait(300) == 0, migrate.said()
        print(report_of(migrate))
        assert disk.read_bytes() == content[:COPY] + content[:COPY]
        destination.run("echo 3 >/proc/sys/vm/drop_caches; echo ok")
        assert destination.run(all_of_it) == md5(content[:COPY] * 2)
        destination.qemu.end()
        destination.storage.end()
        eventually(lambda: w.areas() == [], why="an area was left behind")
