# SPDX-License-Identifier: GPL-2.0-or-later
"""Migrations over a slow link, compressed."""

from pathlib import Path
from typing import Any

from tests.migration.world import PATIENCE, alive, report_of, world
from tests.vm.guest import GuestSpec
from tests.vm.hosts import Link

LINK = Link(rate="100mbit", delay="2ms")
LANES = 2


def moved(tmp: Path, spec: GuestSpec, *arguments: str, on_area: bool) -> dict[str, Any]:
    """The report of one compressed move of a guest that writes all the while and checks it."""
    with world(tmp, LINK) as w:
        if on_area:
            w.source.extra_env["UMEM_RAM"] = "area"
        w.serve()
        # Both hosts have one driver: an area has another name there.
        _, before = w.guest(spec, name="leaver" if on_area else "vm1")
        before.wait("tick", timeout=PATIENCE)
        _, after = w.expect(spec)
        sent = w.source.tx_bytes()
        migrate = w.start(
            w.source,
            *("umemctl", "migrate", "-p", w.destination_uri, "--json", "--lanes", str(LANES)),
            # `auto` may find, rightly, that an emulated processor compresses slower than that.
            *("--vm", "leaver" if on_area else "vm1", "--compress", "on", *arguments),
        )
        assert migrate.wait(300) == 0, migrate.said()
        sent = w.source.tx_bytes() - sent
        alive(after)
        verdict = after.verdict(300)
        assert verdict.ok and verdict.bad == 0, verdict.text
        told = report_of(migrate)
        print(told, sent)
        assert sent < told["bytes_sent"] * 1.2 + 65536
        return told


def test_a_slow_link_carries_less(tmp_path: Path) -> None:
    spec = GuestSpec(workload="verify", writers=1, mb=16, memory="96M")
    told = moved(tmp_path, spec, on_area=False)
    unpacked, packed = told["bytes_before_compression"], told["bytes_after_compression"]
    background = told["pages_background"] * 4096
    assert 0.5 * background < unpacked <= background and packed < 0.7 * unpacked
    wire = sum(told["bytes_sent_by_lane"][f"background-{n}"] for n in range(LANES))
    assert wire < background - (unpacked - packed) + 64 * told["pages_background"] + 65536
    assert wire < 0.85 * background


def test_rounds_of_a_guest_that_writes_meanwhile(tmp_path: Path) -> None:
    # TCG as in test_precopy.py, and for the same reason.
    spec = GuestSpec(workload="verify", writers=1, mb=16, memory="128M", accel="tcg")
    told = moved(tmp_path, spec, "--precopy-rounds", "2", on_area=True)
    assert len(told["precopy"]["rounds"]) == 2
    unpacked, packed = told["bytes_before_compression"], told["bytes_after_compression"]
    background = told["pages_background"] * 4096
    assert unpacked > background + 8 * 2**20, "of the rounds, too"
    assert packed < 0.7 * unpacked
