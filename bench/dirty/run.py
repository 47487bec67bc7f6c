# SPDX-License-Identifier: GPL-2.0-or-later
"""Builds the program, boots one machine, runs every contender in it, shows what came out."""

import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from bench.environment import environment
from bench.fault.run import GCC, OUT, UAPI
from tests.vm import harness

SOURCE = Path(__file__).parent / "dirty.c"
CONTENDERS = ("umem", "soft-dirty", "mprotect")
PRESENT = 1 << 16  # pages in memory of each mapping: 256 MiB
# What is shown: the step, what it is divided by, and how it is called.
ROWS = (
    ("write", "pages", "first write to a page, ns"),
    ("clear", "pages", "reading and clearing, ns per page that was written"),
    ("clean", "gib", "the same with nothing written, us per GiB"),
    ("on", "gib", "switching on, us per GiB"),
    ("off", "gib", "switching off, us per GiB"),
)
Sample = dict[str, str | int]


def script(gibs: list[int], rounds: int) -> str:
    """Compile the program and return the shell text that runs all of it in the machine."""
    OUT.mkdir(parents=True, exist_ok=True)
    program = OUT / "dirty"
    subprocess.run([*GCC, f"-I{UAPI}", str(SOURCE), "-o", str(program)], check=True)
    calls = [
        f"{shlex.quote(str(program))} {what} {gib} {PRESENT} {rounds}"
        for gib in gibs
        for what in CONTENDERS
    ]
    # mprotect() splits the mapping at each page.
    return "\n".join(["set -e", "sysctl -q vm.max_map_count=1000000", *calls]) + "\n"


def measure(kernel: str, cpus: int, mem: str, gibs: list[int], rounds: int) -> list[Sample]:
    """Run it in a machine; exits with the machine's status if that fails."""
    path = OUT / f"dirty-{kernel}.sh"
    path.write_text(script(gibs, rounds))
    argv = [sys.executable, "-m", "tests.vm", "run", "--kernel", kernel, "--mem", mem]
    argv += ["--cpus", str(cpus), "--name", f"bench-dirty-{kernel}", "--", "bash", str(path)]
    done = subprocess.run(argv, cwd=harness.ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        print(done.stdout)
        sys.exit(done.returncode)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"what"')]


def value(samples: list[Sample], what: str, gib: int, step: str, unit: str) -> str:
    """Return the median over the rounds, or a dash for what a contender does not do."""
    found = [s for s in samples if (s["what"], s["gib"], s["step"]) == (what, gib, step)]
    if not found:
        return "-"
    scale = 1000 if unit == "gib" else 1
    return f"{statistics.median(int(s['ns']) / int(s[unit]) / scale for s in found):.0f}"


def table(samples: list[Sample]) -> Table:
    """Show one column for each contender and size."""
    columns = sorted({(int(s["gib"]), str(s["what"])) for s in samples})
    shown = Table(title="the log of writes")
    shown.add_column("what")
    for gib, what in columns:
        shown.add_column(f"{what}, {gib} GiB", justify="right")
    for step, unit, name in ROWS:
        shown.add_row(name, *(value(samples, what, gib, step, unit) for gib, what in columns))
    return shown


@click.command()
@click.option("--kernel", type=click.Choice(harness.KERNELS), default="6.1", show_default=True)
@click.option(
    "--mem",
    default="6G",  # the driver makes areas of four times that, and no larger ones
    show_default=True,
    help="Memory of the machine.",
)
@click.option("--cpus", default=2, show_default=True, help="Processors of the machine.")
@click.option("--rounds", default=5, show_default=True, help="Rounds of each contender.")
@click.option("--gib", multiple=True, type=int, default=(1, 16), help="Size of the mapping.")
def main(kernel: str, mem: str, cpus: int, rounds: int, gib: tuple[int, ...]) -> None:
    """Measure the log of writes against soft-dirty bits and mprotect() of shared memory."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    samples = measure(kernel, cpus, mem, list(gib), rounds)
    facts = environment(kernel, cpus, mem, rounds)
    path = OUT / f"dirty-{kernel}.json"
    path.write_text(json.dumps({"environment": facts, "samples": samples}, indent=1) + "\n")
    console.print(table(samples))
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()))


if __name__ == "__main__":
    main()
