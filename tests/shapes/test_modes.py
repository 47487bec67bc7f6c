# SPDX-License-Identifier: GPL-2.0-or-later
"""One guest, moved by post-copy, by rounds of pre-copy first, and by pre-copy alone, side by side.

Each of the pure ways is bad at one thing: post-copy makes the guest wait for each page that it
touches, pre-copy sends again what is written again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.migration.world import PATIENCE, alive, report_of, world
from tests.vm.guest import GuestSpec

# TCG as in test_precopy.py, and for the same reason.
SPEC = GuestSpec(workload="verify", writers=1, mb=32, memory="128M", accel="tcg")


def moved(tmp: Path, *arguments: str, writes: bool, ends: int = 0) -> dict[str, Any]:
    """The report of one move of a new guest, which checked its memory after it."""
    tmp.mkdir()
    with world(tmp) as w:
        w.source.extra_env["UMEM_RAM"] = "area"
        w.serve()
        _, before = w.guest(SPEC, name="leaver")
        before.wait("tick", timeout=PATIENCE)
        if not writes:
            before.send("stop")
        _, after = w.expect(SPEC, name="vm1")
        migrate = w.start(
            w.source,
            *("umemctl", "migrate", w.destination_uri, "--vm", "leaver", "--json"),
            # What `auto` makes of an emulated processor changes from run to run.
            *("--max-bandwidth", "6M", "--compress", "off", *arguments),
        )
        if not ends:
            migrate.wait_said("runs at", 2 * PATIENCE)
            verdict = after.verdict(2 * PATIENCE)  # it reads all that it owns
        assert migrate.wait(2 * PATIENCE) == ends, migrate.said()
        if ends:
            verdict = before.verdict(2 * PATIENCE)
        assert verdict.ok and verdict.bad == 0, verdict.text
        alive(before if ends else after)
        told = report_of(migrate)
        print(arguments, {key: told[key] for key in ("pages_demand", "bytes_sent", "precopy")})
        return told


@pytest.mark.timeout(1500)
def test_a_guest_that_only_reads_waits_for_less(tmp_path: Path) -> None:
    """And the network carries hardly more."""
    postcopy = moved(tmp_path / "postcopy", "-p", writes=False)
    rounds = moved(tmp_path / "rounds", "-p", "--precopy-rounds", "1", writes=False)
    # Few of what it reads: it reads in order, and the background goes on from each request.
    assert postcopy["pages_demand"] > 100
    assert rounds["pages_demand"] < postcopy["pages_demand"] / 4
    assert rounds["bytes_sent"] < 1.2 * postcopy["bytes_sent"]


@pytest.mark.timeout(1500)
def test_a_guest_that_writes_costs_less(tmp_path: Path) -> None:
    """Pre-copy sends what is written again and again, and then gives up."""
    precopy = moved(tmp_path / "precopy", "--max-downtime", "1", writes=True, ends=1)
    rounds = moved(tmp_path / "rounds", "-p", "--precopy-rounds", "1", writes=True)
    assert precopy["state"] == "failed"
    assert rounds["pages_demand"] > 0 and rounds["bytes_sent"] < precopy["bytes_sent"]
