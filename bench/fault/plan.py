# SPDX-License-Identifier: GPL-2.0-or-later
"""What is measured, in which order.

Contenders take turns within a round and change places from round to round, so that a host that
is slower for a while is slower for all of them.
"""

from collections.abc import Iterator, Sequence

FAULTERS = ("copy", "copy-bare", "continue", "umem", "umem-place")
FILLERS = (*("copy", "copy-bare", "continue", "umem", "umem-touch", "umem-place", "plain", "warm"),)
# It has nothing smaller than a run of 2 MiB.
HUGE_FILLER = "umem-huge"
HUGE_KIB = 2048
THREADS = (1, 4, 16, 64)
FAULTS = 2048
FAULT_MIB = FAULTS * 4 // 1024
RUNS_KIB = (4, 64, 256, HUGE_KIB)
FILL_MIB = 32
SIZES_MIB = (256, 1024, 16384, 65536)
SIZERS = ("umem", "continue", "plain")
SIZE_THREADS = 4
COMPLETE_ROUNDS = 33
# Each of the three mappings is made first in as many processes.
COMPLETE_KINDS = 3
COMPLETE_PROCESSES = 3 * COMPLETE_KINDS
COMPLETE_MIB = 32
# GiB of an area, and how many areas.
MEMORY = ((1, 32), (16, 8))

Command = tuple[str, ...]


def _turns(items: Sequence[str], round_no: int) -> Sequence[str]:
    shift = round_no % len(items)
    return (*items[shift:], *items[:shift])


def _command(*words: object) -> Command:
    return tuple(str(word) for word in words)


def commands(rounds: int) -> Iterator[Command]:
    """Yield the arguments of each run of the program."""
    for threads in THREADS:
        for round_no in range(rounds):
            for who in _turns(FAULTERS, round_no):
                yield _command("faults", who, threads, FAULTS, FAULT_MIB, "all")
            if threads == 1:
                yield _command("pingpong", FAULTS)
    for run_kib in RUNS_KIB:
        who_fills = (*FILLERS, HUGE_FILLER) if run_kib == HUGE_KIB else FILLERS
        for round_no in range(rounds):
            for who in _turns(who_fills, round_no):
                yield _command("fill", who, run_kib, FILL_MIB)
    for spread in ("blocks", "all"):
        for round_no in range(rounds):
            for who in _turns(SIZERS, round_no):
                for mib in SIZES_MIB:
                    yield _command("faults", who, SIZE_THREADS, FAULTS, mib, spread)
    for gib, nr in MEMORY:
        yield _command("memory", gib, nr)
    for process in range(COMPLETE_PROCESSES):
        yield _command("complete", COMPLETE_ROUNDS, COMPLETE_MIB, process % COMPLETE_KINDS)


def script(program: str, rounds: int) -> str:
    """Return the shell script that runs all of it inside the machine."""
    lines = [
        "# Written by bench/fault/plan.py.",
        f"cp {program} /tmp/fault || exit 1",
        # The machine's memory would limit an area to 16 GiB.
        "echo 64 >/sys/module/umem/parameters/max_area_gib || exit 1",
        *(" ".join(("/tmp/fault", *command, "|| exit 1")) for command in commands(rounds)),
    ]
    return "\n".join(lines) + "\n"
