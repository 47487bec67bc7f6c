# SPDX-License-Identifier: GPL-2.0-or-later
"""What the migration bench makes of its samples."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.migration import report
from bench.migration.contest import at
from bench.migration.results import Limit, Process, Results, Sample, Setting, link_name, wanted

SETTING = Setting("random", "random")
CONTENDERS = ["qemu-precopy", "qemu-postcopy", "umem-hybrid", "umem-postcopy"]


def sample(contender: str, number: int, factor: float) -> Sample:
    dice = random.Random(f"{contender} {number}")
    total = 4 * factor * dice.uniform(0.9, 1.1)
    ours = contender.startswith("umem")
    return Sample(
        "random",
        contender,
        number,
        downtime_ms=80 * factor,
        silence_ms=100 * factor,
        total_s=total,
        resident_s=total * 0.8,
        source_free_s=0.3,
        blocked_ms=600 * factor if "postcopy" in contender else None,
        baseline_per_s=1000.0,
        work_lost_s=3 * factor,
        wire_mib=200.0,
        demand_p50_us=1500.0 if ours else None,
        demand_p99_us=9000.0 if ours else None,
        background_mib_s=60.0 if ours else None,
        verdict_ok=True,
        processes=[
            Process("source qemu", 2 * factor, 30.0),
            Process("destination qemu", 3 * factor, 30.0),
            *([Process("umemctl serve", 1.5, 40.0)] if ours else []),
        ],
        timeline=[
            (t / 10, 1000.0 if t < 3 or t > 40 * factor else dice.uniform(10, 300))
            for t in range(-20, 70)
        ],
        switch_t_s=0.3,
        end_t_s=total,
        latency_histogram=[(2.0**n, n * 10) for n in range(8, 15)] if ours else [],
    )


@pytest.fixture
def results() -> Results:
    found = Results(
        "python -m bench.migration.run --quick",
        {"kernel": "6.1.0", "cpus": 2},
        [SETTING, Setting("read", "read", rate=None, delay=None)],
        CONTENDERS,
        {link_name(SETTING): Limit(1000.0, 4000.0, 100.0)},
    )
    for number in range(3):
        for contender, factor in zip(CONTENDERS, (0.7, 1.0, 1.2, 0.55), strict=True):
            found.samples.append(sample(contender, number, factor + number / 100))
    return found


def test_json_comes_back(results: Results) -> None:
    assert Results.from_json(json.loads(json.dumps(results.to_json()))) == results


def test_a_ratio_is_one_of_the_same_round(results: Results) -> None:
    """A busy machine is busy for all contenders of a round."""
    results.samples = [
        replace(sample(name, number, 1.0), total_s=busy * own)
        for number, busy in enumerate((1.0, 50.0, 3.0))
        for name, own in (("qemu-postcopy", 2.0), ("umem-postcopy", 1.0))
    ]
    assert results.ratios("random", "umem-postcopy", "total_s", "qemu-postcopy") == [0.5] * 3
    results.samples[2] = replace(results.samples[2], error="lost")
    assert results.ratios("random", "umem-postcopy", "total_s", "qemu-postcopy") == [0.5] * 2
    assert results.ratio("random", "umem-touch", "total_s", "qemu-postcopy") is None


def test_goals_go_both_ways(results: Results) -> None:
    goals = {one.what: one for one in wanted(results)}
    assert goals["time to fully resident / qemu-postcopy"].met
    assert goals["demand latency p50 / raw TCP"].measured == 1.5
    assert goals["demand latency p50 / raw TCP"].met
    stream = goals["background stream / raw TCP stream"]
    assert stream.measured == 0.6 and not stream.met and not stream.at_most
    assert not goals["vCPU blocked time / qemu-postcopy"].met
    assert {one.setting for one in wanted(results)} == {"random"}, "nothing was measured of read"


def test_the_report_hides_nothing(results: Results, tmp_path: Path) -> None:
    results.samples[0] = replace(results.samples[0], error="not <over> in the time it had")
    results.samples.append(Sample("random", "umem-hybrid", 3, verdict_ok=False))
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results.to_json()))
    done = CliRunner().invoke(report.main, [str(path)])
    assert done.exit_code == 0, done.output
    page = Path(done.output.strip())
    text = page.read_text()
    assert "not &lt;over&gt; in the time it had" in text
    assert "memory is damaged" in text
    assert "MISSED" in text and results.command in text
    plots = sorted(page.parent.glob("*.png"))
    assert [plot.name for plot in plots] == [
        f"random-{what}.png" for what in ("costs", "latencies", "ratios", "timelines")
    ]
    for plot in plots:
        assert plot.stat().st_size > 5000 and f'src="{plot.name}"' in text
    done = CliRunner().invoke(report.main, [str(path), "--text"])
    assert done.exit_code == 0 and "MISSED" in done.output
    done = CliRunner().invoke(report.main, [str(path), "--rst"])
    assert done.exit_code == 0 and "**missed**" in done.output
    assert "* random, qemu-precopy, round 1: not <over>" in done.output


def test_another_format_is_refused_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    for content in ('{"format": 99}', "[]", "garbage"):
        path.write_text(content)
        done = CliRunner().invoke(report.main, [str(path)])
        assert done.exit_code == 1 and done.output.count("\n") == 1, done.output
        assert "not results of this bench" in done.output


def test_work_between_two_steps() -> None:
    points = [(1.0, 100), (2.0, 200), (4.0, 200), (5.0, 300)]
    assert at(points, 1.5) == 150
    assert at(points, 3.0) == 200
    assert at(points, 0.5) == 100
    assert at(points, 9.0) == 300
