# SPDX-License-Identifier: GPL-2.0-or-later
"""bench.native: that it measures what it says, and its arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from bench import native
from bench.native import Figures


def test_a_small_run(tmp_path: Path) -> None:
    words = ["--requests", "50", "--mib", "4", "--rounds", "2", "--save", str(tmp_path / "found")]
    done = CliRunner().invoke(native.main, [*words, "--json"], catch_exceptions=False)
    told = json.loads(done.output)
    assert told == json.loads((tmp_path / "found.json").read_text())
    for side in ("lanes", "raw_tcp"):
        assert 0 < told[side]["p50_us"] <= told[side]["p99_us"] and told[side]["stream_mib_s"] > 0
    table = (tmp_path / "found.rst.inc").read_text()
    assert f"     - {told['lanes']['p50_us']}\n" in table


def test_what_the_link_adds_it_adds_to_both() -> None:
    ours, limits = [Figures(80, 300, 1000)], [Figures(20, 50, 4000)]
    # 1 Gbit/s is 119 MiB/s: both are faster than that.
    ratios = native.on_link(ours, limits, link_us=400, link_gbit=1)
    assert ratios == {"p50_us": 1.14, "p99_us": 1.56, "stream_mib_s": 1.0}
    assert native.on_link(ours, limits, link_us=0, link_gbit=100)["stream_mib_s"] == 0.25
