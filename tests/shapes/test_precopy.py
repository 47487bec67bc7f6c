# SPDX-License-Identifier: GPL-2.0-or-later
"""Rounds of pre-copy, while the guest works and checks its memory, and the switch to post-copy."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.migration.world import PATIENCE, Program, World, alive, eventually, report_of, world
from tests.vm.guest import GuestConsole, GuestSpec

# A guest that works while the log has each page trap is not for KVM in an emulated machine: see
# Documentation/testing.rst, "A guest under KVM that is reset".  That the log sees what KVM writes
# is for tests/driver/test_dirty.py.
SPEC = GuestSpec(workload="verify", writers=1, mb=16, memory="128M", accel="tcg")
PAGES = 128 * 256
MAX_DOWNTIME_MS = 1200
"""What is not for pages takes half a second in the emulated machine."""
BEAT_MS = 20
COLD_MS = {"kvm": 0, "tcg": 10000}
"""A TCG that is new has all of the guest's code to translate, itself emulated: 3 s."""


@pytest.mark.parametrize(("workload", "accel"), [("idle", "kvm"), ("verify", "tcg")])
def test_a_quiet_guest_moves_with_all_its_memory(workload: str, accel: str, tmp_path: Path) -> None:
    spec = replace(SPEC, workload=workload, accel=accel)
    with world(tmp_path, tls=True) as w:
        w.source.extra_env["UMEM_RAM"] = "area"
        w.serve()
        source_qemu, before = w.guest(spec, name="leaver")
        alive(before)
        before.send("stop")  # it reads, and writes no more
        before.send(f"beat {BEAT_MS}")
        _, after = w.expect(spec, name="vm1")
        migrate = w.start(
            w.source,
            *("umemctl", "migrate", w.destination_uri, "--vm", "leaver", "--json"),
            *("--max-downtime", str(MAX_DOWNTIME_MS)),
        )
        assert migrate.wait(2 * PATIENCE) == 0, migrate.said()
        told = report_of(migrate)
        alive(after)
        assert told["state"] == "completed" and told["precopy"]["reason"]
        assert told["pages_demand"] == told["pages_background"] == told["pages_zero"] == 0
        # What it was to those who talk to the guest: it beats as soon as it runs.
        silent_ms = 1000 * (after.messages[0].time - before.messages[-1].time)
        print(silent_ms, told["downtime_ms"], told["downtime_parts_ms"], told["precopy"])
        assert 0 < told["downtime_ms"] <= MAX_DOWNTIME_MS
        assert silent_ms <= MAX_DOWNTIME_MS + BEAT_MS + COLD_MS[accel]
        assert after.verdict(PATIENCE).ok
        assert source_qemu.wait() == 0


class Scene:
    """A guest on an area at the source.  Both hosts have one driver: it has another name there."""

    def __init__(self, w: World) -> None:
        self.w = w
        w.source.extra_env["UMEM_RAM"] = "area"
        self.serve = w.serve()
        self.source_qemu, self.console = w.guest(SPEC, name="leaver")
        self.console.wait("tick", timeout=PATIENCE)

    def expect(self) -> tuple[Program, GuestConsole]:
        return self.w.expect(SPEC, name="vm1")

    def migrate(self, *arguments: str) -> Program:
        w = self.w
        return w.start(
            w.source,
            *("umemctl", "migrate", w.destination_uri, "--vm", "leaver", "--json", *arguments),
        )

    def status(self) -> dict[str, Any]:
        return self.w.migrate_status("leaver")


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with world(tmp_path_factory.mktemp("precopy")) as w:
        yield Scene(w)


def logged(scene: Scene) -> bool:
    """Does the driver's log cost the guest anything?"""
    (area,) = [one for one in scene.w.areas() if one.name.startswith("leaver")]
    return area.mapped


def test_a_guest_that_writes_too_fast_stays(scene: Scene) -> None:
    """Its writer goes through its memory faster than the network takes it; nothing is left."""
    qemu, _ = scene.expect()
    migrate = scene.migrate("--max-bandwidth", "4M", "--max-downtime", "1")
    eventually(lambda: scene.status().get("state") == "precopy-active", why=migrate.said())
    alive(scene.console)
    assert migrate.wait(2 * PATIENCE) == 1, migrate.said()
    assert "pre-copy does not converge" in migrate.said()
    told = report_of(migrate)
    assert told["state"] == "failed" and len(told["precopy"]["rounds"]) > 3
    assert qemu.wait() != 0, "the QEMU that waited in vain is ended"
    alive(scene.console)
    assert scene.console.verdict(PATIENCE).ok
    assert not logged(scene), "the log is off, and the driver out of the way"
    eventually(lambda: scene.w.vm() == {}, why="serve still has the VM")


def test_ctrl_c_in_a_round(scene: Scene) -> None:
    qemu, _ = scene.expect()
    migrate = scene.migrate("--hybrid", "--max-bandwidth", "1M")
    eventually(lambda: (scene.status().get("precopy") or {}).get("round") == 1, why=migrate.said())
    migrate.process.send_signal(2)
    assert migrate.wait() == 130, migrate.said()
    assert qemu.wait() != 0
    alive(scene.console)
    assert not logged(scene)


def test_a_lane_is_lost_in_a_round(scene: Scene) -> None:
    qemu, _ = scene.expect()
    migrate = scene.migrate("--hybrid", "--max-bandwidth", "1M", "--lanes", "2")
    eventually(lambda: scene.status().get("state") == "precopy-active", why=migrate.said())
    workers = [one for one in scene.status()["workers"] if one["lane"].startswith("precopy")]
    assert len(workers) == 2 and all(one["pid"] for one in workers)
    os.kill(workers[1]["pid"], 9)
    assert migrate.wait() == 1, migrate.said()
    assert qemu.wait() != 0
    alive(scene.console)
    assert not logged(scene)


def test_hybrid_always_ends(scene: Scene) -> None:
    """The same guest, the same network; then it moves on, as a VM that lives on an area can."""
    destination_qemu, after = scene.expect()
    migrate = scene.migrate(
        "--hybrid", "--max-bandwidth", "4M", "--max-downtime", "1", "--lanes", "2"
    )
    migrate.wait_said("runs at", 2 * PATIENCE)
    alive(after)
    scene.w.start(
        scene.w.source, "umemctl", "background", "leaver", "--max-bandwidth", "none"
    ).wait()
    assert migrate.wait(2 * PATIENCE) == 0, migrate.said()
    told = report_of(migrate)
    assert told["state"] == "completed"
    rounds = told["precopy"]["rounds"]
    assert len(rounds) > 3 and "no less than" in told["precopy"]["reason"]
    # What the guest misses is what remained, and not all of its memory.
    assert 0 < told["pages_demand"] + told["pages_background"] < PAGES / 2
    assert rounds[0]["sent_pages"] == PAGES
    verdict = after.verdict(PATIENCE)
    assert verdict.ok and verdict.bad == 0, verdict.text
    assert scene.source_qemu.wait() == 0
    eventually(lambda: len(scene.w.areas()) == 1, why="the source's area is left")
    destination_qemu.end()
    eventually(lambda: scene.w.areas() == [], why="an area is left")
