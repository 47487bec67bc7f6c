# SPDX-License-Identifier: GPL-2.0-or-later
"""Behind `make bench`: boots the machine, collects what it measures, writes the report."""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from bench.environment import environment
from bench.migration import plan
from bench.migration.report import tables, write
from bench.migration.results import Limit, Process, Results, Sample
from tests.vm import harness

OUT = harness.BUILD / "bench" / "migration"
_BOOT_S = 120
_SAMPLE_S = 500
"""What one migration may take with everything around it, before the machine is killed."""


def sample_of(told: dict[str, Any]) -> Sample:
    """Return the sample of a line of the machine's.  Raises TypeError, KeyError."""
    told = {name: value for name, value in told.items() if name != "what"}
    told["processes"] = [Process(**one) for one in told["processes"]]
    for name in ("timeline", "latency_histogram"):
        told[name] = [tuple(point) for point in told[name]]
    return Sample(**told)


def median_limits(lines: list[dict[str, Any]]) -> dict[str, Limit]:
    """Return each link's limit, from its measurements."""
    by_link: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        by_link[line["link"]].append(line)
    names = ("request_p50_us", "request_p99_us", "stream_mib_s")
    return {
        link: Limit(**{name: statistics.median(one[name] for one in found) for name in names})
        for link, found in by_link.items()
    }


def keep(results: Results, path: Path, began: float) -> None:
    """Write what there is so far."""
    results.environment["seconds"] = round(time.monotonic() - began)
    path.write_text(json.dumps(results.to_json(), indent=1) + "\n")


class Run:
    """The plan, carried out in a machine; in another one, when the machine is lost."""

    def __init__(
        self, results: Results, argv: list[str], expected: int, console: Console, path: Path
    ) -> None:
        """argv: what boots a machine that carries out a plan, but for the names of the settings.
        expected: so many migrations.  What was measured is always in the file.
        """
        self._results = results
        self._argv = argv
        self._expected = expected
        self._console = console
        self._path = path
        self._began = time.monotonic()
        self._limits: list[dict[str, Any]] = []
        self._begun: list[str] = []

    def measure(self) -> bool:
        """Do it.  Tell whether no machine was lost: an emulated one may stand still, and costs the
        rest of a setting.
        """
        lost: list[str] = []
        columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task("booting", total=self._expected)
            names = [one.name for one in self._results.settings]
            while rest := [name for name in names if name not in self._begun]:
                before = len(self._begun)
                status = self._machine(rest, progress, task)
                if not status:
                    break
                if len(self._begun) == before:
                    raise click.ClickException(f"the machine ends with status {status}")
                lost.append(self._begun[-1])
                self._say(progress, f"the machine was lost in setting {lost[-1]} (status {status})")
        self._results.environment["machines_lost_in"] = lost
        keep(self._results, self._path, self._began)
        return not lost

    def _machine(self, settings: list[str], progress: Progress, task: TaskID) -> int:
        """Boot one and carry out these; return its exit status."""
        argv = [*self._argv, "--settings", ",".join(settings)]
        with subprocess.Popen(argv, cwd=harness.ROOT, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            watchdog = threading.Timer(_SAMPLE_S, process.terminate)
            watchdog.start()
            try:
                for line in process.stdout:
                    if line.startswith('{"what"'):
                        watchdog.cancel()
                        watchdog = threading.Timer(_SAMPLE_S, process.terminate)
                        watchdog.start()
                        self._take(json.loads(line), progress, task)
                    else:
                        self._say(progress, line.rstrip())
            except BaseException:
                # Ctrl-C, say: neither the machine nor a thread that waits is to outlive us.
                process.terminate()
                raise
            finally:
                watchdog.cancel()
        return process.returncode

    def _take(self, told: dict[str, Any], progress: Progress, task: TaskID) -> None:
        match told["what"]:
            case "setting":
                self._begun.append(told["name"])
            case "limit":
                self._limits.append(told)
                self._results.limits = median_limits(self._limits)
            case "sample":
                sample = sample_of(told)
                self._results.samples.append(sample)
                keep(self._results, self._path, self._began)
                how = sample.error or f"{sample.total_s:.1f} s, silent {sample.silence_ms:.0f} ms"
                text = f"{sample.setting}, round {sample.round + 1}, {sample.contender}: {how}"
                self._say(progress, text)
                progress.update(task, advance=1, description=sample.setting)

    def _say(self, progress: Progress, text: str) -> None:
        progress.console.print(text, markup=False, highlight=False)


def _names(text: str | None, known: tuple[str, ...]) -> list[str]:
    if text is None:
        return list(known)
    wanted = text.split(",")
    if unknown := set(wanted) - set(known):
        raise click.UsageError(f"{', '.join(sorted(unknown))}: not among {', '.join(known)}")
    return [name for name in known if name in wanted]


@click.command()
@click.option("--kernel", type=click.Choice(harness.KERNELS), default="6.1", show_default=True)
@click.option("--mem", default="6G", show_default=True, help="Memory of the machine.")
@click.option("--cpus", default=2, show_default=True, help="Processors of the machine.")
@click.option("--quick", is_flag=True, help="The settings and contenders that say most.")
@click.option("--settings", help="Names with commas between; default: all.")
@click.option("--contenders", help="The same.  Default: in each setting those that say most.")
@click.option("--rounds", type=int, help=f"Of each contender.  Default: {plan.ROUNDS}.")
@click.option("--name", default="migration", show_default=True, help="Of the results.")
def main(
    kernel: str,
    mem: str,
    cpus: int,
    quick: bool,
    settings: str | None,
    contenders: str | None,
    rounds: int | None,
    name: str,
) -> None:
    """Measure live migration: umem against QEMU's own, with the same guest, load and link.

    A goal that is missed is shown and is no failure: figures from a busy or an
    emulated machine are for reading.  A guest whose memory is damaged is one.
    """
    console = Console(width=None if sys.stdout.isatty() else 140)
    all_settings = tuple(one.name for one in plan.SETTINGS)
    if quick:
        settings = settings or ",".join(plan.QUICK_SETTINGS)
        contenders = contenders or ",".join(plan.QUICK_CONTENDERS)
    rounds = rounds or (plan.QUICK_ROUNDS if quick else plan.ROUNDS)
    chosen = _names(settings, all_settings)
    picked = _names(contenders, tuple(plan.BY_NAME)) if contenders else []
    by_setting = [plan.players(name, picked) for name in chosen]
    met = {name for names in by_setting for name in names}
    expected = rounds * sum(len(names) for names in by_setting)
    inside = ["python", "-m", "bench.migration.inside", "--rounds", str(rounds)]
    inside += ["--contenders", ",".join(picked)]
    limit_s = _BOOT_S + _SAMPLE_S * expected
    argv = [sys.executable, "-m", "tests.vm", "run", "--kernel", kernel, "--mem", mem]
    argv += ["--cpus", str(cpus), "--name", f"bench-{name}", "--timeout", str(limit_s)]
    argv += ["--env", f"PYTHONPATH={harness.ROOT}", "--", *inside]
    again = ["python", "-m", "bench.migration.run", *sys.argv[1:]]
    results = Results(
        command=shlex.join(again),
        environment=environment(kernel, cpus, mem, rounds),
        settings=[one for one in plan.SETTINGS if one.name in chosen],
        contenders=[name for name in plan.BY_NAME if name in met],
        plan=dict(zip(chosen, by_setting, strict=True)),
    )
    OUT.mkdir(parents=True, exist_ok=True)
    path: Path = OUT / f"{name}.json"
    whole = Run(results, argv, expected, console, path).measure()
    if results.samples:
        for table in tables(results):
            console.print(table)
        page = write(results, OUT / name)
        console.print(f"{path}\n{page}", markup=False, highlight=False)
    if damaged := [one for one in results.samples if one.verdict_ok is False]:
        raise click.ClickException(f"{len(damaged)} guests say that their memory is damaged")
    if not whole:
        raise click.ClickException("a machine was lost, and the rest of its setting with it")


if __name__ == "__main__":
    main(prog_name="python -m bench.migration.run")
