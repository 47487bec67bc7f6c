# SPDX-License-Identifier: GPL-2.0-or-later
"""Whole migrations of a guest that works and checks its own memory."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.migration.world import PATIENCE, World, alive, eventually, report_of, world
from tests.vm.flaky import EMULATED_KVM
from tests.vm.guest import GuestSpec

SPEC = GuestSpec(workload="verify", writers=1, mb=16, memory="96M")
PAGES = 96 * 256


def check_after(world: World, migrate_said: dict[str, object], pages: int) -> None:
    """What holds after every migration that came to its end."""
    told = migrate_said
    assert told["state"] == "completed" and told["pages_total"] == pages
    counts = [told[f"pages_{kind}"] for kind in ("demand", "background", "zero")]
    assert sum(int(str(count)) for count in counts) == pages, "each page was sent once"
    assert int(str(told["pages_zero"])) > 0
    assert int(str(told["bytes_sent"])) < pages * 4096
    parts = told["downtime_parts_ms"]
    assert isinstance(parts, dict) and {"drain", "device_state", "load", "commit"} == parts.keys()
    assert abs(sum(parts.values()) - float(str(told["downtime_ms"]))) < 0.1
    assert all(ms > 0 for ms in parts.values())
    assert "20" < str(told["stopped_at"]) < str(told["committed_at"])
    print("downtime", told["downtime_ms"], parts)
    assert not Path("/dev/shm/umem-src/vm1").exists(), "the RAM file is gone"
    assert not list((world.source.runtime / "migrate").glob("*.json"))
    eventually(lambda: world.vm() == {}, why="serve still has the VM")
    check_reports(world, told)
    history = world.serve_status()["history"]
    assert history[-1]["state"] == "completed"
    (area,) = world.areas()
    # Plain shared memory by now: the driver does not answer for QEMU's mapping any more.
    assert area.complete and not area.served and not area.mapped


def check_reports(world: World, told: dict[str, object]) -> None:
    """Both sides left a report, and what they counted is the same."""
    kept = []
    for runtime, side in ((world.source.runtime, "source"), (world.destination.runtime, "desti")):
        *_, path = sorted((runtime / "reports").glob(f"*-{side}*-vm1.json"))
        kept.append(json.loads(path.read_text()))
    source, destination = kept
    assert {key: source[key] for key in told} == told
    assert destination["state"] == "completed" and destination["session"] == told["session"]
    for name in ("pages_total", "pages_demand", "pages_background", "pages_zero", "requests"):
        assert source[name] == destination[name], name
    sent = source["bytes_sent_by_lane"]
    received = destination["bytes_received_by_lane"]
    assert received.keys() == sent.keys() and received["control"] == sent["control"] > 0
    for lane in received.keys() - {"control"}:
        assert received[lane] == sent[lane], lane
    asked = sum(one["requests"] for one in destination["demand_latency_histogram"])
    assert 0 < asked <= destination["requests"]
    assert source["demand_latency_p50_us"] <= source["demand_latency_p99_us"]
    assert destination["faults_major"] > 0 and destination["blocked_ms"] > 0
    assert 0 < source["blocked_ms"] <= destination["blocked_ms"]
    assert 0 < destination["time_to_resident_s"] < destination["total_s"]


@pytest.mark.parametrize(
    ("accel", "vcpus", "workload", "qemu"),
    [
        pytest.param(
            *("kvm", 2, "verify", "UMEM_QEMU10"), id="kvm-2cpu-qemu10", marks=EMULATED_KVM
        ),
        pytest.param("tcg", 1, "ab", "UMEM_QEMU", id="tcg-ab"),
    ],
)
def test_a_working_guest_moves(
    accel: str, vcpus: int, workload: str, qemu: str, tmp_path: Path
) -> None:
    spec = replace(SPEC, accel=accel, vcpus=vcpus, writers=vcpus, workload=workload)
    if accel == "kvm":
        # QEMU 10 cannot load the nested state of an emulated AMD processor; the guest needs none.
        spec = replace(spec, extra=("-cpu", "host,-svm"))
    with world(tmp_path) as w:
        serve = w.serve()
        source_qemu, before = w.guest(spec, qemu=qemu)
        # It works while it moves; what comes before has the emulated CPUs for itself.
        before.wait("tick", timeout=PATIENCE)
        before.send("stop")
        destination_qemu, after = w.expect(spec, qemu=qemu)
        (area,) = w.areas()
        assert area.name == "vm1.ram0" and area.nr_cached == 0 and area.served
        migrate = w.migrate("--json", "--lanes", "2")
        serve.wait_said("migration of vm1 begins")
        before.send("go")
        assert migrate.wait(300) == 0, migrate.said()
        told = report_of(migrate)
        assert source_qemu.wait() == 0
        alive(after)
        verdict = after.verdict(300)
        print(f"{accel}: {verdict}\n{json.dumps(told)}\n{serve.said()}")
        assert verdict.ok and verdict.bad == 0, verdict.text
        check_after(w, told, PAGES)
        assert before._ended
        destination_qemu.end()
        eventually(lambda: w.areas() == [], why="the area outlives its QEMU")
        serve.process.terminate()
        assert serve.wait() == 0


def test_pages_on_demand_only(tmp_path: Path) -> None:
    """-n: nothing but neighbours comes unasked, until `umemctl background`; Ctrl-C is refused
    meanwhile.
    """
    spec = replace(SPEC, workload="idle")
    with world(tmp_path) as w:
        serve = w.serve()
        _, _ = w.guest(spec)
        _, after = w.expect(spec)
        migrate = w.migrate("-n", "--json", "--prefetch-forward", "4")
        migrate.wait_said("vm1 runs at")
        alive(after)
        told = eventually(lambda: w.migrate_status())
        assert told["state"] == "postcopy-active" and not told["background"]
        assert told["pages_background"] == 0 and 0 < told["pages_demand"] < PAGES / 2
        vm = w.vm()
        assert vm["state"] == "postcopy-active"
        assert 0 < vm["areas"][0]["cached_bytes"] < vm["areas"][0]["size_bytes"]
        migrate.process.send_signal(2)
        migrate.wait_said("Ctrl-C: not stopping: vm1 runs at")
        serve.process.terminate()
        serve.wait_said("SIGTERM: not stopping: vm1")
        second = w.start(w.destination, "umemctl", "serve")
        assert second.wait() == 1 and "runs already" in second.said()
        again = w.migrate()
        assert again.wait() == 1, again.said()
        alive(after)
        done = w.source.run(["umemctl", "background", "vm1", "--max-bandwidth", "1"])
        assert done.returncode == 0, done.stderr
        told = w.migrate_status()
        assert told["background"] and told["max_bandwidth_bytes_s"] == 1
        done = w.source.run(["umemctl", "background", "vm1", "--max-bandwidth", "none"])
        assert done.returncode == 0, done.stderr
        assert migrate.wait(300) == 0, migrate.said()
        verdict = after.verdict(300)
        assert verdict.ok, verdict.text
        told = report_of(migrate)
        assert told["pages_prefetched"] > 0
        check_after(w, told, PAGES)
