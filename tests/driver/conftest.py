# SPDX-License-Identifier: GPL-2.0-or-later
"""Fixtures of the driver's tests, and the check after each that nothing was left behind."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from pyumem import uapi
from pyumem.area import Area

from .build import program
from .support import (
    PAGE,
    SLOW,
    Agent,
    areas,
    kill_left,
    module_refs,
    open_fds,
    wait_until,
)

_numbers = itertools.count()

# What only a kernel of its own kind can run; the others do not have it to be skipped.
FAIL_NTH = Path("/proc/self/fail-nth")
collect_ignore = [] if FAIL_NTH.exists() else ["test_failnth.py"]


def pytest_report_header() -> str:
    """Tell what is left out, and why."""
    if FAIL_NTH.exists():
        return "umem: this kernel injects faults"
    return "umem: test_failnth.py is left out: this kernel has no fault injection"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give every test a time limit that fits an emulated machine."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            own = item.get_closest_marker("timeout")
            seconds = own.args[0] if own else 60
            item.add_marker(pytest.mark.timeout(seconds * SLOW), append=False)


@pytest.fixture(scope="session", autouse=True)
def driver() -> None:
    """Stop at once when there is nothing to test."""
    if not Path(uapi.DEVICE).exists():
        pytest.exit("no umem driver here; try: make test T=tests/driver", returncode=2)


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test no area, no reference to the module and no descriptor of ours is left.

    Set up first and therefore torn down last, after the agents and areas of the test.
    """
    refs, fds = module_refs(), open_fds()
    assert not areas(), "areas of somebody else"
    yield
    if hasattr(request.node, "driver_failed"):
        # One message is enough, but what is left would have all later tests fail.
        if areas():
            print(f"left behind, and killed: {kill_left()}")
            with contextlib.suppress(AssertionError):
                wait_until(lambda: not areas(), "the areas are gone")
                wait_until(lambda: module_refs() == refs, "the module's references are dropped")
        return
    wait_until(lambda: not areas(), "the areas are gone")
    wait_until(lambda: module_refs() == refs, "the module's references are dropped")
    wait_until(lambda: not list(Path("/dev").glob("umem[0-9]*")), "the nodes are gone")
    assert open_fds() == fds


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Remember a failure, for nothing_left."""
    report = yield
    if call.when == "call" and report.failed:
        item.driver_failed = True  # type: ignore[attr-defined]
    return report


@pytest.fixture
def new_agent() -> Iterator[Callable[..., Agent]]:
    """Return a function that starts agents, which are killed at the end of the test."""
    agents: list[Agent] = []

    def start(**options: object) -> Agent:
        agents.append(Agent(program("agent"), **options))  # type: ignore[arg-type]
        return agents[-1]

    yield start
    for agent in agents:
        agent.close()


@pytest.fixture
def agent(new_agent: Callable[..., Agent]) -> Agent:
    """A consumer.  It has none of the server's descriptors."""
    return new_agent()


@pytest.fixture
def new_area() -> Iterator[Callable[[int], Area]]:
    """Return a function that makes areas of so many pages, which are closed at the end."""
    made: list[Area] = []

    def create(npages: int) -> Area:
        made.append(Area.create(f"test.{next(_numbers)}", npages * PAGE))
        return made[-1]

    yield create
    for area in made:
        area.close()


@pytest.fixture(scope="session")
def ram_disk() -> Iterator[Path]:
    """A block device in memory, of 64 MiB: for direct I/O and for swap."""
    subprocess.run(["modprobe", "brd", "rd_nr=1", "rd_size=65536"], check=True)
    device = Path("/dev/ram0")
    wait_until(device.exists, "the RAM disk is there")
    yield device
    subprocess.run(["modprobe", "-r", "brd"], check=True)


@pytest.fixture
def area(new_area: Callable[[int], Area]) -> Area:
    """An area of 64 pages, all of them missing."""
    return new_area(64)


@pytest.fixture
def mount() -> Iterator[Path]:
    """Where the driver's file system is mounted; other users get there too."""
    point = Path(tempfile.mkdtemp(dir="/run"))
    point.chmod(0o755)
    subprocess.run(["mount", "-t", "umem", "none", point], check=True)
    yield point
    # Agents that still have a file of it open are killed after this.
    subprocess.run(["umount", "--lazy", point], check=True)
    point.rmdir()
