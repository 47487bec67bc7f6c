# SPDX-License-Identifier: GPL-2.0-or-later
"""A destination whose memory cgroup is too small for the VM that comes: it waits, for ever if need
be, and goes on when the limit is raised; nobody is killed.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.migration.world import PATIENCE, alive, eventually, world
from tests.vm.guest import GuestSpec

MIB = 1 << 20
SPEC = GuestSpec(workload="verify", writers=1, mb=16, memory="96M")


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Path]:
    root = tmp_path / "cgroup"
    root.mkdir()
    subprocess.run(["mount", "-t", "cgroup2", "none", root], check=True)
    (root / "cgroup.subtree_control").write_text("+memory")
    found = root / "vm1"
    found.mkdir()
    yield found
    eventually(lambda: not (found / "cgroup.procs").read_text())
    found.rmdir()
    subprocess.run(["umount", root], check=True)


def test_too_small_a_memory_cgroup(
    group: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What pays is the cgroup in which QEMU maps its RAM.
    wrapper = tmp_path / "qemu"
    wrapper.write_text(
        f'#!/bin/sh\necho $$ >{group}/cgroup.procs\nexec {os.environ["UMEM_QEMU"]} "$@"\n'
    )
    wrapper.chmod(0o755)
    monkeypatch.setenv("UMEM_QEMU_IN_GROUP", str(wrapper))
    with world(tmp_path) as w:
        serve = w.serve()
        _, console = w.guest(SPEC)
        console.wait("tick", timeout=PATIENCE)
        qemu, after = w.expect(SPEC, qemu="UMEM_QEMU_IN_GROUP")
        used = int((group / "memory.current").read_text())
        (group / "memory.max").write_text(str(used + 16 * MIB))
        migrate = w.migrate("--json")
        serve.wait_said("no memory for its pages: memory.max of")
        eventually(lambda: w.vm()["state"] == "postcopy-paused", why=f"{w.vm()}")
        migrated = w.vm()["migration"]
        assert "no memory for its pages" in migrated["reason"] and migrated["memory_waits"] > 0
        assert migrate.process.poll() is None and qemu.process.poll() is None
        here = w.areas()[0].nr_cached
        assert here * 4096 < 96 * MIB
        (group / "memory.max").write_text("max")
        assert migrate.wait(300) == 0, migrate.said()
        alive(after)
        verdict = after.verdict(300)
        assert verdict.ok and verdict.bad == 0, verdict.text
        events = dict(line.split() for line in (group / "memory.events").read_text().splitlines())
        assert events["oom_kill"] == "0", "somebody was killed"
        qemu.end()
