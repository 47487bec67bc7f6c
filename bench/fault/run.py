# SPDX-License-Identifier: GPL-2.0-or-later
"""Builds the program, boots one machine, runs the plan in it, shows what came out."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import click
from rich.console import Console

from bench.environment import environment
from bench.fault import plan
from bench.fault.results import Results, as_json
from bench.fault.tables import tables
from tests.vm import harness

HERE = Path(__file__).parent
OUT = harness.BUILD / "bench"
UAPI = harness.ROOT / "kmod/include/uapi"
GCC = ("gcc", "-O2", "-static", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-pthread")


def build() -> Path:
    """Compile the program, unless it is newer than all it is made of; return where it is."""
    OUT.mkdir(parents=True, exist_ok=True)
    program = OUT / "fault"
    sources = sorted(HERE.glob("*.c"))
    made_of = [*sources, HERE / "bench.h", UAPI / "linux/umem.h", Path(__file__)]
    made = program.stat().st_mtime if program.exists() else 0.0
    if any(path.stat().st_mtime >= made for path in made_of):
        names = [str(path) for path in sources]
        subprocess.run([*GCC, f"-I{UAPI}", *names, "-o", str(program)], check=True)
    return program


def measure(kernel: str, cpus: int, mem: str, rounds: int, console: Console) -> Results:
    """Run the plan in a machine; exits with the machine's status if that fails."""
    script = OUT / f"fault-{kernel}.sh"
    script.write_text(plan.script(shlex.quote(str(build())), rounds))
    expected = sum(1 for _ in plan.commands(rounds))
    argv = [sys.executable, "-m", "tests.vm", "run", "--kernel", kernel, "--mem", mem]
    argv += ["--cpus", str(cpus), "--name", f"bench-fault-{kernel}", "--", "bash", str(script)]
    results = Results()
    with subprocess.Popen(argv, cwd=harness.ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        with console.status("booting") as status:
            for line in process.stdout:
                if not line.startswith('{"what"'):
                    console.print(line.rstrip(), markup=False)
                    continue
                results.samples.append(json.loads(line))
                words = " ".join(str(value) for value in results.samples[-1].values())
                status.update(f"{len(results.samples)} of {expected}: {words[:60]}")
    if process.returncode:
        sys.exit(process.returncode)
    if len(results.samples) != expected:
        raise click.ClickException(f"{len(results.samples)} of {expected} measurements came")
    return results


@click.command()
@click.option("--kernel", type=click.Choice(harness.KERNELS), default="6.1", show_default=True)
@click.option("--mem", default="4G", show_default=True, help="Memory of the machine.")
@click.option("--cpus", default=2, show_default=True, help="Processors of the machine.")
@click.option("--rounds", default=5, show_default=True, help="Runs of each contender.")
@click.option("--show", type=click.Path(path_type=Path), help="Show a JSON file, measure nothing.")
def main(kernel: str, mem: str, cpus: int, rounds: int, show: Path | None) -> None:
    """Measure page faults: umem against userfaultfd and plain memory.

    A value that is missed is shown and is no failure: figures from a busy
    or an emulated machine are for reading.  A wrong page is one.
    """
    console = Console(width=None if sys.stdout.isatty() else 120)
    if show is not None:
        kept = json.loads(show.read_text())
        results, facts = Results(kept["samples"]), kept["environment"]
    else:
        results = measure(kernel, cpus, mem, rounds, console)
        facts = environment(kernel, cpus, mem, rounds)
        path = OUT / f"fault-{kernel}.json"
        path.write_text(json.dumps(as_json(results, facts), indent=1) + "\n")
    for table in tables(results):
        console.print(table)
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()))
    if results.wrong_pages():
        raise click.ClickException(f"{results.wrong_pages()} pages had wrong content")


if __name__ == "__main__":
    main()
