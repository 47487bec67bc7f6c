# SPDX-License-Identifier: GPL-2.0-or-later
"""The figures that `make bench-fault` makes of its samples."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console

from bench.fault import plan
from bench.fault.results import Results, Sample, as_json, ratio, wanted
from bench.fault.tables import tables

ROUNDS = 3
SPEED = {"copy": 10.0, "copy-bare": 9.0, "continue": 8.0, "umem": 4.0}
SPEED |= {"umem-place": 5.0, "plain": 1.0}
RATE = {"umem": 30e3, "umem-huge": 40e3, "copy": 10e3, "copy-bare": 12e3}


def sample(command: plan.Command) -> Sample:
    """What the program would have printed."""
    what, *words = command
    got: Sample = {"what": what}
    match what:
        case "faults":
            got |= {"contender": words[0], "threads": int(words[1]), "mib": int(words[3])}
            got |= {"spread": words[4], "bad": 0, "us_per_fault": SPEED[words[0]]}
        case "fill":
            got |= {"contender": words[0], "run_kib": int(words[1])}
            got |= {"pages_per_s": RATE.get(words[0], 20e3)}
        case "pingpong":
            got |= {"us_per_round": 2.0}
        case "memory":
            got |= {"gib": int(words[0]), "charged_kib": 66.0 * int(words[0])}
            got |= {"kernel_kib": 70.0 * int(words[0])}
        case "complete":
            keys = ("first_ns", "steady_ns", "first_min_ns", "steady_min_ns")
            got |= {kind: dict.fromkeys(keys, 5.0) for kind in ("memfd", "before", "after")}
    return got


def run(change: Callable[[Sample], None] = lambda _sample: None) -> Results:
    """A run of the whole plan, changed sample by sample."""
    samples = [sample(command) for command in plan.commands(ROUNDS)]
    for one in samples:
        change(one)
    return Results(samples)


def test_a_good_run_meets_what_is_wanted() -> None:
    assert [one.what for one in wanted(run()) if not one.met] == []


def test_slow_faults_are_missed() -> None:
    def slow(sample: Sample) -> None:
        if sample.get("contender") == "umem" and sample.get("threads") == 16:
            sample["us_per_fault"] = 7.0

    missed = [one.what for one in wanted(run(slow)) if not one.met]
    assert missed == [f"fault, 16 threads / {name}" for name in ("CONTINUE", "COPY", "bare COPY")]


def test_one_thread_needs_only_one_of_two() -> None:
    def slow_continue(sample: Sample) -> None:
        if sample["what"] == "pingpong":
            sample["us_per_round"] = 4.0
        if sample.get("contender") == "continue":
            sample["us_per_fault"] = 4.0

    first = wanted(run(slow_continue))[0]
    assert (first.what, first.met) == ("fault, 1 thread / ping-pong", True)


def test_an_area_size_that_costs_is_missed() -> None:
    def slow(sample: Sample) -> None:
        if sample.get("contender") == "umem" and sample.get("mib") == 65536:
            sample["us_per_fault"] *= 1.2

    missed = [one.what for one in wanted(run(slow)) if not one.met]
    assert missed == ["fault, slowest / fastest area size"]


def test_a_disturbed_first_size_does_not_hide_behind_itself() -> None:
    def slow(sample: Sample) -> None:
        if sample.get("contender") == "umem" and sample.get("mib") == 256:
            sample["us_per_fault"] *= 2

    assert "fault, slowest / fastest area size" in [
        one.what for one in wanted(run(slow)) if not one.met
    ]


def test_a_complete_area_may_not_be_faster_than_memory() -> None:
    def fast(sample: Sample) -> None:
        if sample["what"] == "complete":
            sample["after"] = {**sample["after"], "steady_ns": 3.7}

    missed = [one.what for one in wanted(run(fast)) if not one.met]
    assert missed == ["complete, mapped, after: off memfd"]


def test_a_disturbed_round_counts_for_both_sides() -> None:
    assert ratio([4.0, 40.0, 4.0], [8.0, 80.0, 8.0]) == 0.5


def test_contenders_take_turns() -> None:
    nr = len(plan.FAULTERS)
    firsts = [command[1] for command in plan.commands(nr) if command[0] == "faults"][::nr][:nr]
    assert firsts == list(plan.FAULTERS)


def test_every_table_can_be_drawn() -> None:
    console = Console(width=160, record=True)
    for table in tables(run()):
        console.print(table)
    text = console.export_text()
    assert "64 GiB" in text and "met" in text
    kept = as_json(run(), {"kernel": "6.1"})
    assert kept["environment"] == {"kernel": "6.1"}
