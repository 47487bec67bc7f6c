# SPDX-License-Identifier: GPL-2.0-or-later
"""After the commit: the guest runs at the destination, and needs its memory from the source.

What goes wrong then never lets both run, never makes up a page, and loses nothing that is there.
"""

import json
import os
import signal
from pathlib import Path

from pyumem import wire
from tests.migration.test_before_commit import say_to_port
from tests.migration.world import alive, eventually, world
from tests.vm.guest import GuestSpec

SPEC = GuestSpec(workload="idle", writers=1, mb=16, memory="96M")


def test_strangers_disturb_nothing_and_a_lost_lane_pauses(tmp_path: Path) -> None:
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

        cached = w.areas()[0].nr_cached
        worker = next(
            one["pid"] for one in w.vm()["migration"]["workers"] if one["lane"] == "urgent-0"
        )
        os.kill(worker, signal.SIGKILL)
        assert migrate.wait() == 4, migrate.said()
        assert "where its missing pages wait" in migrate.said()
        serve.wait_said("was killed by SIGKILL")
        assert f"Its memory is kept here: {ram}" in migrate.said()
        eventually(lambda: w.vm()["state"] == "postcopy-paused")
        serve.wait_said("the guest waits for its missing pages")
        assert not Path(f"/proc/{worker}").exists(), "a zombie is left"
        assert ram.exists() and record.exists()
        assert destination_qemu.process.poll() is None
        (area,) = w.areas()
        assert area.nr_cached >= cached and area.served and not area.complete

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
