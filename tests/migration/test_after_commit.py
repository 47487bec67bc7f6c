# SPDX-License-Identifier: GPL-2.0-or-later
"""After the commit: the guest runs at the destination, and needs its memory from the source.

What goes wrong then never lets both run, never makes up a page, and loses nothing that is there.
"""

import json
import os
import signal
from pathlib import Path

import pytest

from pyumem import wire
from tests.migration.test_before_commit import say_to_port
from tests.migration.world import alive, eventually, world
from tests.vm.guest import GuestSpec

SPEC = GuestSpec(workload="idle", writers=1, mb=16, memory="96M")


def test_strangers_disturb_nothing_and_the_memory_is_kept(tmp_path: Path) -> None:
    with world(tmp_path) as w:
        serve = w.serve()
        source_qemu, _ = w.guest(SPEC)
        destination_qemu, after = w.expect(SPEC)
        migrate = w.migrate("-n", "--json")
        migrate.wait_said("vm1 runs at")
        assert source_qemu.wait() == 0, "the source's QEMU is gone right after the commit"
        alive(after)

        # Whoever else comes to the port changes nothing.
        say_to_port(w, [b"QEVM" + bytes(60), wire.pack_pages(0, 1 << 40, 1, 4096), b"\xff" * 30])
        serve.wait_said("QEMU's own migration stream")
        serve.wait_said("began with PAGES instead of HELLO")
        assert w.vm()["state"] == "postcopy-active"
        alive(after)

        # The RAM file is the only copy of what is not there yet: it is kept, and not reused.
        ram = Path("/dev/shm/umem-src/vm1/ram0")
        record = w.source.runtime / "migrate" / "vm1.json"
        assert ram.exists() and json.loads(record.read_text())["ram"][0]["path"] == str(ram)

        assert destination_qemu.process.poll() is None
        (area,) = w.areas()
        assert area.served and not area.complete

        again = w.guest_refused(SPEC)
        assert "may need the memory kept here" in again

        # The daemon goes at the second request only.  The guest's QEMU stays, and can be ended.
        qemu_pid = w.vm()["qemu_pid"]
        serve.process.terminate()
        serve.wait_said("SIGTERM: not stopping: vm1")
        assert serve.process.poll() is None
        serve.process.terminate()
        assert serve.wait() == 0
        assert destination_qemu.process.poll() is None
        # Its main loop may wait for a page, too, and then hears nothing but this.
        os.kill(qemu_pid, signal.SIGKILL)
        assert destination_qemu.wait() == 128 + signal.SIGKILL
        eventually(lambda: w.areas() == [], why="an area was left behind")
        # The source does not know that yet, and goes on trying.
        eventually(lambda: w.migrate_status().get("state") == "postcopy-paused")
        assert ram.exists() and record.exists()
        migrate.process.send_signal(signal.SIGINT)
        assert migrate.wait() == 4, migrate.said()
        assert f"memory is kept here: {ram}" in migrate.said()
        assert ram.exists() and record.exists()


def test_the_guest_ends_before_all_of_it_has_moved(tmp_path: Path) -> None:
    """Nobody needs the rest then: both sides finish, and nothing is left."""
    with world(tmp_path) as w:
        serve = w.serve()
        w.guest(SPEC)
        destination_qemu, after = w.expect(SPEC)
        migrate = w.migrate("-n", "--json")
        migrate.wait_said("vm1 runs at")
        alive(after)
        destination_qemu.process.terminate()
        assert destination_qemu.wait() == 0
        assert migrate.wait() == 0, migrate.said()
        assert '"guest_ended": "host-signal"' in migrate.said()
        assert not Path("/dev/shm/umem-src/vm1").exists()
        eventually(lambda: w.areas() == [], why="an area was left behind")
        serve.process.terminate()
        assert serve.wait() == 0


@pytest.mark.one_kernel
def test_the_end_is_told_to_a_source_that_missed_it(tmp_path: Path) -> None:
    """The guest's QEMU is killed while the network is cut."""
    with world(tmp_path) as w:
        serve = w.serve()
        w.guest(SPEC)
        destination_qemu, console = w.expect(SPEC)
        migrate = w.migrate("-n", "--json")
        migrate.wait_said("vm1 runs at")
        alive(console)
        w.source.link_up(False)
        eventually(lambda: w.vm().get("state") == "postcopy-paused", seconds=60)
        # A SIGTERM might wait for a page with QEMU's main loop.
        os.kill(w.vm()["qemu_pid"], signal.SIGKILL)
        assert destination_qemu.wait() == 128 + signal.SIGKILL
        eventually(lambda: w.vm() == {}, why="serve still has the VM")
        w.source.link_up(True)
        assert migrate.wait() == 4, migrate.said()
        assert "says gone" in migrate.said() and "ram0" in migrate.said()
        serve.wait_said(" was told: gone")
        eventually(lambda: w.areas() == [], why="an area was left behind")
        # The port is free for another at once.
        w.expect(SPEC, name="vm2")
