# SPDX-License-Identifier: GPL-2.0-or-later
"""A balloon that is inflated, and deflated, while most of the guest's memory is still elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

from tests.migration.world import PATIENCE, alive, ask_qemu, eventually, report_of, world
from tests.shapes.test_blocks import memory_of
from tests.vm.guest import GuestSpec

MIB = 1 << 20
SIZE = 160 * MIB
TAKEN, GIVEN_BACK = 48 * MIB, 16 * MIB
SPEC = GuestSpec(
    workload="verify",
    mb=16,
    memory="160M",
    virtio=True,
    extra=("-device", "virtio-balloon-pci"),
)
GARBAGE = b"\xee" * 4096


def fill_largest_hole(ram: Path) -> set[int]:
    """Write garbage where the guest never looked, which is free memory of its.  Returns the pages.

    A page that is fetched after it was discarded, or is not zeroed, then shows itself.
    """
    with ram.open("r+b") as file:
        holes, at = [], 0
        while at < SIZE:
            start = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            try:
                at = os.lseek(file.fileno(), start, os.SEEK_DATA)
            except OSError:
                at = SIZE
            holes.append((at - start, start))
        length, start = max(holes)
        file.seek(start)
        for _ in range(length // 4096):
            file.write(GARBAGE)
    return set(range(start // 4096, (start + length) // 4096))


def test_balloon_during_post_copy(tmp_path: Path) -> None:
    monitor = tmp_path / "destination.qmp"

    def balloon(size: int) -> None:
        ask_qemu(monitor, "balloon", value=size)
        eventually(lambda: ask_qemu(monitor, "query-balloon")["actual"] == size)

    with world(tmp_path) as w:
        w.serve()
        _, console = w.guest(SPEC)
        console.wait("tick", timeout=PATIENCE)
        garbage = fill_largest_hole(Path("/dev/shm/umem-src/vm1/ram0"))
        print(f"{len(garbage)} pages of garbage")
        assert len(garbage) * 4096 > TAKEN
        _, after = w.expect(SPEC, arguments=("-qmp", f"unix:{monitor},server=on,wait=off"))
        migrate = w.migrate("-n", "--json")
        migrate.wait_said("vm1 runs at")
        alive(after)
        fetched = w.migrate_status()["pages_demand"]
        balloon(SIZE - TAKEN)
        told = w.migrate_status()
        inflated = told["pages_demand"] - fetched
        print(f"{inflated} pages were fetched while {TAKEN // 4096} were given back: {told}")
        # What is given back is not touched first.
        assert inflated < TAKEN // 4096 // 4 and told["pages_zero"] > TAKEN // 4096 // 2
        alive(after)
        balloon(SIZE - TAKEN + GIVEN_BACK)
        alive(after)
        done = w.source.run(["umemctl", "background", "vm1"])
        assert done.returncode == 0, done.stderr
        assert migrate.wait(300) == 0, migrate.said()
        told = report_of(migrate)
        counts = [told[f"pages_{kind}"] for kind in ("demand", "background", "zero")]
        assert sum(counts) == SIZE // 4096, "each page came once, discarded or not"
        verdict = after.verdict(300)
        assert verdict.ok and verdict.bad == 0, verdict.text
        ask_qemu(monitor, "stop")
        memory = memory_of(w.destination.runtime / "areas" / "vm1.ram0")
        zero = sum(memory[4096 * page : 4096 * (page + 1)] == bytes(4096) for page in garbage)
        print(f"{zero} of the pages of garbage are zero now")
        assert zero > (TAKEN - GIVEN_BACK) // 4096 // 2
