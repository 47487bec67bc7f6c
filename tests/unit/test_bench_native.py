# SPDX-License-Identifier: GPL-2.0-or-later
"""bench.native: that it measures what it says, and its arithmetic."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from bench import native
from bench.migration.results import Limit
from bench.native_qemu import Figures, Peer


def test_a_small_run(tmp_path: Path) -> None:
    words = ["--requests", "50", "--mib", "4", "--rounds", "2", "--save", str(tmp_path / "found")]
    done = CliRunner().invoke(native.main, [*words, "--json"], catch_exceptions=False)
    told = json.loads(done.output)
    assert told == json.loads((tmp_path / "found.json").read_text())
    for side in ("lanes", "raw_tcp"):
        assert (
            0 < told[side]["request_p50_us"] <= told[side]["request_p99_us"]
            and told[side]["stream_mib_s"] > 0
        )
    table = (tmp_path / "found.rst.inc").read_text()
    assert f"     - {told['lanes']['request_p50_us']}\n" in table


def test_a_lane_that_ends_is_no_fast_one() -> None:
    area = native.PipeArea(4)
    area.mark([(0, 3)])
    os.close(area.wake)
    with pytest.raises(click.ClickException, match="before its time"):
        native.stream(area)
    area.close()


def test_what_the_link_adds_it_adds_to_both() -> None:
    ours, limits = [Limit(80, 300, 1000)], [Limit(20, 50, 4000)]
    # 1 Gbit/s is 119 MiB/s: both are faster than that.
    ratios = native.on_link(ours, limits, link_us=400, link_gbit=1)
    assert ratios == {"request_p50_us": 1.14, "request_p99_us": 1.56, "stream_mib_s": 1.0}
    assert native.on_link(ours, limits, link_us=0, link_gbit=100)["stream_mib_s"] == 0.25


def test_what_a_request_costs_qemu_is_on_the_same_link() -> None:
    ours, peers = [native.figures([100.0] * 9 + [1000.0], 1500)], [Figures(70, 500)]
    assert ours[0].request_mean_us == 190
    assert native.to_qemu(ours, peers, link_us=400) == {
        "request_mean_us": 1.26,
        "stream_mib_s": 3.0,
    }


def test_a_qemu_that_is_none(tmp_path: Path) -> None:
    peer = Peer(tmp_path / "qemu", tmp_path, tmp_path)
    ram = tmp_path / "ram"
    ram.write_bytes(bytes(4096))
    with pytest.raises(click.ClickException, match="qemu"):
        peer.measure(ram, 10)
