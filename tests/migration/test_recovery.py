# SPDX-License-Identifier: GPL-2.0-or-later
"""After the commit: whatever is cut or killed costs time and nothing else.

One guest, which works and checks its memory all the while, goes through all of it on its way, and
gets the rest of its memory at the end.  The tests depend on their order.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.migration.world import (
    PATIENCE,
    Program,
    World,
    alive,
    eventually,
    report_of,
    world,
)
from tests.vm.guest import GuestSpec
from tests.vm.hosts import Host

pytestmark = pytest.mark.one_kernel

# TCG as in test_before_commit.py, and for the same reason.
SPEC = GuestSpec(workload="verify", writers=1, mb=16, memory="96M", accel="tcg")
PAGES = 96 * 256
# Slow enough that the background is not through before all of this happened, had it been on.
OPTIONS = ("--json", "--max-bandwidth", "200K", "--release-ram")
OTHER_ADDRESS = "10.77.0.22"
RAM = Path("/dev/shm/umem-src/vm1/ram0")


class Scene:
    def __init__(self, w: World) -> None:
        self.w = w
        self.serve = w.serve()
        self.source_qemu, console = w.guest(SPEC)
        console.wait("tick", timeout=PATIENCE)
        self.destination_qemu, self.console = w.expect(SPEC)
        self.migrate = w.migrate("--lanes", "2", *OPTIONS)
        self.migrate.wait_said("vm1 runs at")
        assert self.source_qemu.wait() == 0
        alive(self.console)

    @property
    def recoveries(self) -> int:
        return int(self.w.migrate_status().get("recoveries", 0))

    def pages_flow(self, more_than: int = -1) -> None:
        """Both sides say so, after so many recoveries, and the guest gets what it touches."""
        w = self.w

        def active() -> bool:
            assert self.migrate.process.poll() is None, self.migrate.said()
            return (
                w.migrate_status().get("state") == "postcopy-active"
                and w.vm().get("state") == "postcopy-active"
                and self.recoveries > more_than
            )

        eventually(active, why=f"{self.migrate.said()[-3000:]}\n{self.serve.said()[-3000:]}")
        (area,) = w.areas()
        before = area.nr_cached
        eventually(lambda: w.areas()[0].nr_cached > before, why="no page came after a recovery")
        alive(self.console)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    # Under TLS, so that every lane's handshake is done again each time.
    tmp = tmp_path_factory.mktemp("recovery")
    with world(tmp, tls=True, more_names=(OTHER_ADDRESS,)) as w:
        yield Scene(w)


def worker_of(side: dict[str, Any], lane: str) -> int:
    return int(next(one["pid"] for one in side["workers"] if one["lane"] == lane))


@pytest.mark.parametrize(
    ("side", "lane"), [("source", "background-1"), ("destination", "urgent-0")]
)
def test_a_worker_is_killed(scene: Scene, side: str, lane: str) -> None:
    w, before = scene.w, scene.recoveries
    status = w.migrate_status() if side == "source" else w.vm()["migration"]
    worker = worker_of(status, lane)
    os.kill(worker, signal.SIGKILL)
    scene.pages_flow(before)
    assert not Path(f"/proc/{worker}").exists(), "a zombie is left"
    (area,) = w.areas()
    assert not area.complete


def test_the_network_is_cut(scene: Scene) -> None:
    w, before = scene.w, scene.recoveries
    w.source.link_up(False)
    for state in (w.migrate_status, w.vm):
        eventually(
            lambda state=state: state().get("state") in ("postcopy-paused", "postcopy-recover"),  # type: ignore[misc]
            seconds=60,
            why="nobody noticed",
        )
    w.source.link_up(True)
    # It tries by itself, ever less often; the operator need not wait for that.
    told = w.start(w.source, "umemctl", "recover", "vm1")
    assert told.wait() == 0, told.said()
    scene.pages_flow(before)


def test_the_destination_moves_to_another_address(scene: Scene) -> None:
    w, before = scene.w, scene.recoveries
    add_address(w.destination, f"{OTHER_ADDRESS}/24")
    told = w.start(w.source, "umemctl", "recover", "vm1", f"tcp:{OTHER_ADDRESS}:4444")
    assert told.wait() == 0, told.said()
    scene.pages_flow(before)
    assert w.migrate_status()["destination"] == f"tcp:{OTHER_ADDRESS}:4444"


def add_address(host: Host, address: str) -> None:
    host.run(["ip", "addr", "add", address, "dev", "umem0"], check=True)


def test_serve_is_killed(scene: Scene) -> None:
    w, before = scene.w, scene.recoveries
    scene.serve.process.kill()
    scene.serve.process.wait()
    assert scene.destination_qemu.process.poll() is None, "the guest's QEMU is not its launcher's"
    (area,) = w.areas()
    assert not area.complete
    scene.serve = w.serve()
    scene.serve.wait_said("vm1: adopted")
    scene.pages_flow(before)


def test_serve_is_stopped_twice(scene: Scene) -> None:
    """It says no once; the next one takes over all the same."""
    w, before, serve = scene.w, scene.recoveries, scene.serve
    serve.process.terminate()
    serve.wait_said("SIGTERM: not stopping: vm1")
    serve.process.terminate()
    assert serve.wait() == 0
    scene.serve = w.serve()
    scene.pages_flow(before)


def test_migrate_is_killed(scene: Scene) -> None:
    w = scene.w
    workers = [one["pid"] for one in w.migrate_status()["workers"]]
    scene.migrate.process.kill()
    scene.migrate.process.wait()
    eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
    eventually(lambda: w.vm()["state"] == "postcopy-paused", why="nobody noticed")
    assert RAM.exists()
    assert "may need the memory kept here" in w.guest_refused(SPEC)
    shown = w.start(w.source, "umemctl", "status")
    shown.wait()
    assert "vm1: postcopy-paused" in shown.said()

    scene.migrate = resume(w)
    scene.pages_flow()
    second = resume(w)
    assert second.wait() == 1, second.said()
    assert "a migration of vm1 runs already" in second.said()


def resume(w: World) -> Program:
    return w.start(w.source, *("umemctl", "migrate", "--resume", "--vm", "vm1", *OPTIONS))


def test_both_are_killed(scene: Scene) -> None:
    w = scene.w
    for program in (scene.migrate, scene.serve):
        program.process.kill()
        program.process.wait()
    scene.migrate = resume(w)
    scene.migrate.wait_said("not yet:")
    scene.serve = w.serve()
    scene.pages_flow()


def test_ctrl_c_while_paused_leaves_it_to_a_later_one(scene: Scene) -> None:
    w = scene.w
    scene.migrate.process.send_signal(signal.SIGINT)
    scene.migrate.wait_said("not stopping: vm1 runs at")
    w.source.link_up(False)
    eventually(lambda: w.migrate_status().get("state") == "postcopy-paused", seconds=60)
    scene.migrate.process.send_signal(signal.SIGINT)
    assert scene.migrate.wait() == 4, scene.migrate.said()
    assert "umemctl migrate --resume --vm vm1" in scene.migrate.said()
    w.source.link_up(True)
    scene.migrate = resume(w)
    scene.pages_flow()


def test_and_in_the_end_all_of_it_is_there(scene: Scene) -> None:
    w = scene.w
    # Its holes, and what is there already, take no memory at the source any more.
    assert RAM.stat().st_blocks * 512 <= (PAGES - w.areas()[0].nr_cached + 2000) * 4096
    told = w.start(w.source, "umemctl", "background", "vm1", "--max-bandwidth", "none")
    assert told.wait() == 0, told.said()
    assert scene.migrate.wait(300) == 0, scene.migrate.said()
    assert report_of(scene.migrate)["pages_released"] > 1000
    verdict = scene.console.verdict(300)
    assert verdict.ok and verdict.bad == 0, verdict.text
    assert not Path("/dev/shm/umem-src/vm1").exists(), "the RAM file is gone"
    assert not list((w.source.runtime / "migrate").glob("*.json"))
    assert not list((w.destination.runtime / "incoming").glob("*.json"))
    (area,) = w.areas()
    assert area.complete and not area.served and not area.mapped
    scene.destination_qemu.end()
    eventually(lambda: w.areas() == [], why="an area was left behind")
    scene.serve.process.terminate()
    assert scene.serve.wait() == 0
