# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs the test suites one after the other and sums them up; used by `make test`.

Every part runs even when one before it failed, so that one call shows all.  A
part fails when its command does; the machine's parts also when the kernel log
is bad (see tests/vm).  The last line is the sum: "N passed, N failed, N skipped".
"""

import os
import shlex
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "build" / "test"
IN_VM = ("tests/driver", "tests/migration")
ON_DEMAND = ("tests/shapes",)
"""They run in the machine too, but are no part of `make test`, for their time."""
VM_SECONDS = 3000
"""Time limit of one machine."""
TEST_SECONDS = 900
"""Time limit of one test in it that has none of its own."""


@dataclass(frozen=True)
class Part:
    """One command of the run."""

    name: str
    argv: list[str]
    report: Path | None = None
    """The JUnit file that its pytest writes."""


@dataclass(frozen=True)
class Outcome:
    """How a part ended."""

    part: Part
    status: int
    seconds: float
    passed: int
    failed: int
    skipped: int

    def __str__(self) -> str:
        """Return the part's line of the summary."""
        word = "ok" if self.status == 0 else f"FAILED ({self.status})"
        counts = f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"
        shown = counts if self.part.report else ""
        return f"  {self.part.name:<16} {self.seconds:6.0f} s  {word:<12} {shown}"


def _pytest(report: Path, arguments: list[str]) -> list[str]:
    return ["python", "-m", "pytest", f"--junitxml={report}", *arguments]


def host_part(name: str, arguments: list[str]) -> Part:
    """Return a part that runs on the host: the tests under tests/NAME."""
    report = RESULTS / f"{name}.xml"
    argv = _pytest(report, arguments or [f"tests/{name}"])
    return Part(name, [sys.executable, *argv[1:]], report)


def vm_part(name: str, kernel: str, machine: list[str], arguments: list[str]) -> Part:
    """Return the part that runs pytest in a machine with that kernel."""
    report = RESULTS / f"{name}-{kernel}.xml"
    slow = float(os.environ.get("UMEM_SLOW", "1"))
    argv = [sys.executable, "-m", "tests.vm", "run", "--kernel", kernel, *machine]
    argv += ["--name", f"{name}-{kernel}", "--timeout", str(VM_SECONDS * slow)]
    # An emulated machine that shares its host with others is slow, and not wrong for that.
    command = shlex.join(_pytest(report, [f"--timeout={TEST_SECONDS * slow}", *arguments]))
    return Part(f"{name} {kernel}", [*argv, "--shell-command", command], report)


def _counts(report: Path | None) -> tuple[int, int, int]:
    """Return (passed, failed, skipped) of a JUnit file."""
    if report is None or not report.exists():
        return 0, 0, 0
    try:
        suites = list(ET.parse(report).getroot().iter("testsuite"))
    except ET.ParseError:
        return 0, 0, 0
    tests, failed, skipped = 0, 0, 0
    for suite in suites:
        tests += int(suite.get("tests", 0))
        failed += int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        skipped += int(suite.get("skipped", 0))
    return tests - failed - skipped, failed, skipped


def run_part(part: Part) -> Outcome:
    """Run one part to its end; its output goes to the terminal."""
    if part.report is not None:
        part.report.unlink(missing_ok=True)
    print(f"==> test: {part.name}", flush=True)
    started = time.monotonic()
    env = {**os.environ, "UMEM_BUILD": str(ROOT / "build")}
    status = subprocess.run(part.argv, cwd=ROOT, env=env, check=False).returncode
    passed, failed, skipped = _counts(part.report)
    if status and not failed:
        # Lint, a dead machine, a bad kernel log: something failed all the same.
        failed = 1
    return Outcome(part, status, time.monotonic() - started, passed, failed, skipped)


def plan(
    parts: tuple[str, ...], only: str | None, kernels: list[str], machine: list[str]
) -> list[Part]:
    """Return what is to be run, in its order."""
    if only is not None:
        if only.startswith(IN_VM + ON_DEMAND):
            return [vm_part("one", kernel, machine, [only, "-v"]) for kernel in kernels]
        return [host_part("unit", [only, "-v"])]
    planned: list[Part] = []
    for part in parts:
        match part:
            case "lint":
                planned.append(Part("lint", ["scripts/lint.sh"]))
            case "unit":
                planned.append(host_part("unit", []))
            case "harness":
                planned.append(host_part("harness", []))
            case _:
                paths = list(IN_VM) if part == "vm" else [f"tests/{part}"]
                for kernel in kernels:
                    later = ["-m", "not one_kernel"] if kernel != kernels[0] else []
                    planned.append(vm_part(part, kernel, machine, [*paths, *later]))
    return planned


@click.command()
@click.option("--kernel", "kernels", multiple=True, default=["6.1", "6.12"])
@click.option("--mem", default="4G")
@click.option("--cpus", default="2")
@click.option("--only", help="One test: path::name.")
@click.argument(
    "parts",
    nargs=-1,
    type=click.Choice(["lint", "unit", "harness", "vm", "driver", "migration", "shapes"]),
)
def main(
    kernels: tuple[str, ...], mem: str, cpus: str, only: str | None, parts: tuple[str, ...]
) -> None:
    """Run PARTS: lint, unit, harness, driver, migration, shapes; vm is driver and migration in one
    boot.
    """
    RESULTS.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    machine = ["--mem", mem, "--cpus", cpus]
    outcomes = [run_part(part) for part in plan(parts, only, list(kernels), machine)]
    seconds = time.monotonic() - started
    print(f"==> test: all of it, {seconds // 60:.0f} min {seconds % 60:.0f} s")
    for outcome in outcomes:
        print(outcome)
    passed = sum(outcome.passed for outcome in outcomes)
    failed = sum(outcome.failed for outcome in outcomes)
    skipped = sum(outcome.skipped for outcome in outcomes)
    print(f"{passed} passed, {failed} failed, {skipped} skipped", flush=True)
    sys.exit(1 if any(outcome.status for outcome in outcomes) else 0)


if __name__ == "__main__":
    main()
