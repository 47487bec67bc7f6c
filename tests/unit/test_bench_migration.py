# SPDX-License-Identifier: GPL-2.0-or-later
"""What the migration bench makes of its samples."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from rich.console import Console

from bench.migration import plan, report
from bench.migration.contest import at
from bench.migration.plan import CONTENDERS
from bench.migration.plots import PLOTS, colours
from bench.migration.results import (
    Limit,
    Process,
    Results,
    Sample,
    Setting,
    link_name,
    unmeasured,
    wanted,
)
from bench.migration.run import Run
from bench.migration.usage import Usage

SETTING = Setting("random", "random")
UNSEEN = Setting("read", "read", rate=None, delay=None)
FACTORS = {"qemu-precopy": 0.7, "qemu-postcopy": 1.0, "umem-hybrid": 1.2, "umem-postcopy": 0.55}
ALL = [*(one.name for one in CONTENDERS), "umem-new"]
BASELINE_PER_S = 1000.0


def sample(contender: str, number: int, factor: float, setting: str = "random") -> Sample:
    """Return what a migration could have been like, of a length in proportion to the factor."""
    dice = random.Random(f"{setting} {contender} {number}")
    total = 4 * factor * dice.uniform(0.9, 1.1)
    ours = contender.startswith("umem")
    demand = ours and "precopy" not in contender
    post = demand or contender in ("qemu-postcopy", "qemu-hybrid")
    switch = 0.3 if "hybrid" not in contender and post else 0.7 * total

    def speed(t: float) -> float:
        if t < 0 or t > total:
            return dice.uniform(950, 1050)
        return dice.uniform(500, 900) if t < switch else dice.uniform(10, 300)

    return Sample(
        setting,
        contender,
        number,
        downtime_ms=80 * factor * dice.uniform(0.7, 1.2) if post else dice.uniform(220, 320),
        silence_ms=100 * factor * dice.uniform(0.8, 1.4) if post else dice.uniform(250, 400),
        total_s=total,
        resident_s=total - switch if post else 0.0,
        source_free_s=switch,
        blocked_ms=600 * factor * dice.uniform(0.8, 1.3) if post else None,
        baseline_per_s=BASELINE_PER_S,
        work_lost_s=3 * factor,
        wire_mib=140.0 * dice.uniform(1.0, 1.02) if post else 380.0,
        demand_p50_us=1500.0 if demand else None,
        demand_p99_us=9000.0 if demand else None,
        background_mib_s=60.0 if contender.startswith("umem-postcopy") else None,
        verdict_ok=True,
        processes=[
            Process("source qemu", 2 * factor, 130.0),
            Process("destination qemu", 3 * factor, 130.0),
            *([Process("umemctl serve", 1.5, 40.0)] if ours else []),
            *([Process("umemctl migrate", 0.9, 55.0)] if ours else []),
        ],
        timeline=[(t / 10, speed(t / 10)) for t in range(-30, int(10 * total) + 20)],
        switch_t_s=switch,
        end_t_s=total,
        latency_histogram=[
            *((2.0**n, int(dice.uniform(0.7, 1.3) * 2 ** (9 - abs(n - 10)))) for n in range(8, 15)),
            (math.inf, 1),
        ]
        if demand
        else [],
    )


def run(factors: dict[str, float], rounds: int = 3) -> Results:
    found = Results(
        "python -m bench.migration.run --quick",
        {"kernel": "6.1.0", "cpus": 2, "accel": "kvm"},
        [SETTING, UNSEEN],
        list(factors),
        {link_name(SETTING): Limit(1000.0, 4000.0, 100.0)},
    )
    for number in range(rounds):
        for contender, factor in factors.items():
            found.samples.append(sample(contender, number, factor + number / 100))
    return found


@pytest.fixture
def results() -> Results:
    return run(FACTORS)


def everybody() -> Results:
    """Return a run of all contenders, with whatever can go wrong in one."""
    dice = random.Random(7)
    found = run({name: FACTORS.get(name, dice.uniform(0.5, 2.5)) for name in ALL})
    changed = []
    for one in found.samples:
        if one.contender == "qemu-precopy":
            one = replace(
                sample("qemu-precopy", one.round, 10.0),
                error="not over in the time it had",
                downtime_ms=None,
                silence_ms=None,
                total_s=None,
                resident_s=None,
                switch_t_s=None,
            )
        elif (one.contender, one.round) == ("umem-touch", 1):
            one = Sample("random", "umem-touch", 1, error="GuestError: [/no] step <from> the guest")
        elif (one.contender, one.round) == ("umem-n", 2):
            one = replace(one, verdict_ok=False)
        elif one.contender == "umem-prefetch":
            one = replace(one, blocked_ms=None, work_lost_s=-0.1, demand_p50_us=None)
        changed.append(one)
    found.samples = [one for one in changed if one.contender != "qemu-hybrid"]
    return found


def invoke(results: Results, tmp_path: Path, *words: str) -> str:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results.to_json(), allow_nan=False))
    done = CliRunner().invoke(report.main, [str(path), *words])
    assert done.exit_code == 0, done.output
    return done.output


def test_json_comes_back(results: Results) -> None:
    assert Results.from_json(json.loads(json.dumps(results.to_json(), allow_nan=False))) == results


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


@pytest.mark.parametrize("nothing", [0.0, -0.2, None])
def test_there_is_no_ratio_to_nothing(results: Results, nothing: float | None) -> None:
    """Work lost may be less than none; a ratio to that would meet every goal."""
    results.samples = [
        replace(one, work_lost_s=nothing) if one.contender == "qemu-postcopy" else one
        for one in results.samples
    ]
    assert results.ratio("random", "umem-postcopy", "work_lost_s", "qemu-postcopy") is None
    assert "guest work lost / qemu-postcopy" in {one.what for one in unmeasured(results)}


def test_goals_go_both_ways(results: Results) -> None:
    goals = {one.what: one for one in wanted(results)}
    assert goals["time to fully resident / qemu-postcopy"].met
    assert goals["demand latency p50 / raw TCP"].measured == 1.5
    assert goals["demand latency p50 / raw TCP"].met
    assert not goals["guest work lost / qemu-postcopy"].limit < 0.55
    stream = goals["background stream / raw TCP stream"]
    assert stream.measured == 0.6 and not stream.met and not stream.at_most
    assert {one.setting for one in wanted(results)} == {"random"}, "nothing was measured of read"


def test_a_goal_without_a_figure_is_not_met(results: Results) -> None:
    """A contender all of whose migrations fail must not be without goals to miss."""
    results.samples = [
        replace(one, error="lost") if one.contender == "umem-postcopy" else one
        for one in results.samples
    ]
    assert wanted(results) == []
    missing = unmeasured(results)
    assert {one.setting for one in missing} == {"random", "read"}
    assert not any(one.met for one in missing)
    # Whom the run was not to measure, it does not miss.
    results.contenders.remove("umem-postcopy")
    assert unmeasured(results) == []


def test_the_report_hides_nothing(tmp_path: Path) -> None:
    results = everybody()
    page = Path(invoke(results, tmp_path).strip())
    text = page.read_text()
    for name in ALL:
        assert f"<td>{name}<td>" in text, "also one that has nothing to show"
    assert "not over in the time it had" in text
    assert "step &lt;from&gt; the guest" in text
    assert "memory is damaged" in text
    assert "<td>qemu-precopy<td>0 of 3" in text and "<td>umem-touch<td>2 of 3" in text
    assert "MISSED" in text and "not measured" in text and results.command in text
    plots = sorted(page.parent.glob("*.png"))
    assert {plot.name for plot in plots} == {f"random-{plot.__name__}.png" for plot in PLOTS}
    for plot in plots:
        assert plot.stat().st_size > 5000 and f'src="{plot.name}"' in text


def test_the_terminal_is_told_the_same(tmp_path: Path) -> None:
    text = invoke(everybody(), tmp_path, "--text")
    assert not list(tmp_path.glob("**/*.png"))
    assert "MISSED" in text and "[/no] step <from> the guest" in " ".join(text.split())
    assert all(name in text for name in ALL)


def test_the_documentation_is_told_the_same(tmp_path: Path) -> None:
    text = invoke(everybody(), tmp_path, "--rst")
    assert "**missed**" in text and "not measured" in text
    assert "* random, qemu-precopy, round 1: not over in the time it had" in text
    assert "* random, umem-n, round 3: the guest's memory is damaged" in text


def test_a_run_of_nothing_is_a_page(tmp_path: Path) -> None:
    page = Path(invoke(Results("again", {}, [SETTING], ["umem-n"]), tmp_path).strip())
    assert "umem-n" in page.read_text() and not list(page.parent.glob("*.png"))


def test_one_contender_alone_is_drawn(tmp_path: Path) -> None:
    """Without whom the others are held against."""
    page = Path(invoke(run({"umem-hybrid": 1.0}, rounds=1), tmp_path).strip())
    assert not (page.parent / "random-ratios.png").exists()
    assert (page.parent / "random-absolutes.png").stat().st_size > 5000


def test_a_contender_has_one_colour() -> None:
    every = colours(ALL)
    assert len(set(every.values())) == len(ALL)
    assert colours(["umem-postcopy"]) == {"umem-postcopy": every["umem-postcopy"]}


def test_another_format_is_refused_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    for content, why in (
        ('{"format": 99}', "format 99, not 1"),
        ("[]", "not results of this bench"),
        ("garbage", "not results of this bench"),
    ):
        path.write_text(content)
        done = CliRunner().invoke(report.main, [str(path)])
        assert done.exit_code == 1 and done.output.count("\n") == 1, done.output
        assert why in done.output


def test_work_between_two_steps() -> None:
    points = [(1.0, 100), (2.0, 200), (4.0, 200), (5.0, 300)]
    assert at(points, 1.5) == 150
    assert at(points, 3.0) == 200
    assert at(points, 0.5) == 100
    assert at(points, 9.0) == 300


def test_what_children_use_is_their_parents() -> None:
    """Those that have ended, and those that live on."""
    spin = "import time\nwhile time.process_time() < 0.5: pass\n"
    code = (
        "import subprocess, sys, time\n"
        f"subprocess.run([sys.executable, '-c', {spin!r}])\n"
        f"subprocess.Popen([sys.executable, '-c', {spin!r} + 'time.sleep(60)'])\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        try:
            with Usage({"it": parent.pid}) as usage:
                deadline = time.monotonic() + 30
                while usage.processes()[0].cpu_s < 0.9 and time.monotonic() < deadline:
                    time.sleep(0.05)
            (found,) = usage.processes()
        finally:
            for child in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split():
                os.kill(int(child), 9)
            parent.kill()
        # Each counts in ticks of 10 ms.
        assert 0.9 <= found.cpu_s < 1.8 and found.peak_mib > 1


def test_who_meets_a_setting() -> None:
    assert plan.players("random") == list(plan.BY_NAME)
    assert plan.players("random-no-apf") == ["qemu-postcopy", "umem-postcopy"]
    assert plan.players("random-no-apf", ["umem-n", "qemu-precopy"]) == ["qemu-precopy", "umem-n"]
    assert set(plan._PLAYERS) <= {one.name for one in plan.SETTINGS}
    assert {name for names in plan._PLAYERS.values() for name in names} <= set(plan.BY_NAME)


def test_who_was_not_to_meet_a_setting_is_not_shown(results: Results) -> None:
    results.plan = {one.name: ["qemu-postcopy"] for one in results.settings}
    assert [row.contender for row in report.rows_of(results, results.settings[0])] == [
        "qemu-postcopy"
    ]
    assert not wanted(results) and not unmeasured(results)


_MACHINE = """
import json, sys
names = sys.argv[sys.argv.index("--settings") + 1].split(",")
limit = {"request_p50_us": 1, "request_p99_us": 2, "stream_mib_s": 3}
for name in names:
    print(json.dumps({"what": "setting", "name": name}))
    print(json.dumps({"what": "limit", "link": "none none", **limit}), flush=True)
    if name == sys.argv[1]:
        sys.exit(9)
    sample = {"setting": name, "contender": "umem-hybrid", "round": 0, "total_s": 1.0}
    sample |= {"silence_ms": 2.0, "processes": [], "timeline": [], "latency_histogram": []}
    print(json.dumps({"what": "sample", **sample}), flush=True)
"""


def _run(tmp_path: Path, dies_in: str) -> tuple[bool, Results]:
    names = ("idle", "read", "random")
    settings = [one for one in plan.SETTINGS if one.name in names]
    results = Results("command", {}, settings, ["umem-hybrid"])
    argv = [sys.executable, "-c", _MACHINE, dies_in]
    path = tmp_path / "found.json"
    whole = Run(results, argv, 3, Console(quiet=True), path).measure()
    return whole, Results.from_json(json.loads(path.read_text()))


def test_a_machine_that_is_lost_costs_a_setting(tmp_path: Path) -> None:
    whole, found = _run(tmp_path, "read")
    assert not whole and found.environment["machines_lost_in"] == ["read"]
    assert [one.setting for one in found.samples] == ["random", "idle"]
    assert _run(tmp_path, "none")[0]


def test_a_machine_that_does_not_boot_ends_the_run(tmp_path: Path) -> None:
    results = Results("command", {}, list(plan.SETTINGS[:1]), ["umem-hybrid"])
    argv = [sys.executable, "-c", "raise SystemExit(3)"]
    with pytest.raises(click.ClickException, match="status 3"):
        Run(results, argv, 1, Console(quiet=True), tmp_path / "found.json").measure()
