# SPDX-License-Identifier: GPL-2.0-or-later
"""A migration over a slow link, compressed."""

from pathlib import Path

from tests.migration.world import PATIENCE, alive, report_of, world
from tests.vm.guest import GuestSpec
from tests.vm.hosts import Link

SPEC = GuestSpec(workload="verify", writers=1, mb=16, memory="96M")


def test_a_slow_link_carries_less(tmp_path: Path) -> None:
    with world(tmp_path, Link(rate="100mbit", delay="2ms")) as w:
        w.serve()
        _, before = w.guest(SPEC)
        before.wait("tick", timeout=PATIENCE)
        _, after = w.expect(SPEC)
        sent = w.source.tx_bytes()
        # `auto` may find, rightly, that an emulated processor compresses slower than that.
        migrate = w.migrate("--json", "--lanes", "2", "--compress", "on")
        assert migrate.wait(300) == 0, migrate.said()
        sent = w.source.tx_bytes() - sent
        alive(after)
        verdict = after.verdict(300)
        assert verdict.ok and verdict.bad == 0, verdict.text
        told = report_of(migrate)
        print(told, sent)
        unpacked, packed = told["bytes_before_compression"], told["bytes_after_compression"]
        background = told["pages_background"] * 4096
        assert 0.5 * background < unpacked <= background and packed < 0.7 * unpacked
        by_lane = told["bytes_sent_by_lane"]
        wire = by_lane["background-0"] + by_lane["background-1"]
        assert wire < background - (unpacked - packed) + 64 * told["pages_background"] + 65536
        assert wire < 0.85 * background and sent < told["bytes_sent"] * 1.2 + 65536
