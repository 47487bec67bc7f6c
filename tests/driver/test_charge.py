# SPDX-License-Identifier: GPL-2.0-or-later
"""Which memory cgroup pays for the pages of an area."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyumem import uapi
from pyumem.area import Area

from .support import LONG, PAGE, Agent, page_bytes, serve, wait_until, write

NPAGES = 2048
SIZE = NPAGES * PAGE
# The kernel charges some pages ahead on each CPU.
SLACK = 1 << 20


class Group:
    """A memory cgroup."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()

    def take(self, pid: int) -> None:
        (self.path / "cgroup.procs").write_text(str(pid))

    @property
    def charged(self) -> int:
        return int((self.path / "memory.current").read_text())

    def remove(self) -> None:
        wait_until(lambda: not (self.path / "cgroup.procs").read_text(), "the cgroup is empty")
        self.path.rmdir()


@pytest.fixture
def new_group(tmp_path: Path) -> Iterator[Callable[[str], Group]]:
    """Return a function that makes cgroups, which are removed at the end."""
    root = tmp_path / "cgroup"
    root.mkdir()
    subprocess.run(["mount", "-t", "cgroup2", "none", root], check=True)
    (root / "cgroup.subtree_control").write_text("+memory")
    groups: list[Group] = []

    def make(name: str) -> Group:
        groups.append(Group(root / name))
        return groups[-1]

    yield make
    for group in groups:
        group.remove()
    subprocess.run(["umount", root], check=True)


@pytest.fixture
def consumer_group(
    new_group: Callable[[str], Group], new_agent: Callable[..., Agent]
) -> Iterator[tuple[Agent, Group]]:
    """A consumer in a cgroup of its own; this process, the server, is not in it."""
    group, agent = new_group("consumer"), new_agent()
    group.take(agent.pid)
    yield agent, group
    agent.close()


def test_what_the_server_writes_is_charged_to_the_consumer(
    new_area: Callable[[int], Area], consumer_group: tuple[Agent, Group]
) -> None:
    agent, group = consumer_group
    area = new_area(NPAGES)
    agent.map_node(area)
    before = group.charged
    write(area, 0, NPAGES // 2)
    assert group.charged - before >= SIZE // 2 - SLACK
    # In place it is a fault of ours, and the control of this test.
    before = group.charged
    serve(area, NPAGES // 2, NPAGES // 2)
    assert abs(group.charged - before) < SLACK


def test_without_a_consumer_the_server_pays(
    new_area: Callable[[int], Area], consumer_group: tuple[Agent, Group]
) -> None:
    agent, group = consumer_group
    area = new_area(NPAGES)
    before = group.charged
    write(area, 0, NPAGES // 2)
    agent.map_node(area)
    assert abs(group.charged - before) < SLACK


def test_the_first_consumer_pays(
    new_area: Callable[[int], Area],
    consumer_group: tuple[Agent, Group],
    new_group: Callable[[str], Group],
    new_agent: Callable[..., Agent],
) -> None:
    first, group = consumer_group
    other, second = new_group("second"), new_agent()
    other.take(second.pid)
    area = new_area(NPAGES)
    first.map_node(area)
    second.map_node(area)
    before, of_second = group.charged, other.charged
    write(area, 0, NPAGES)
    assert group.charged - before >= SIZE - SLACK
    assert abs(other.charged - of_second) < SLACK
    second.close()


def test_the_descriptor_outlives_its_area(area: Area, consumer_group: tuple[Agent, Group]) -> None:
    agent, _ = consumer_group
    agent.map_node(area)
    fd = os.dup(area.shmem_fd)
    agent.close()
    area.close()
    control = uapi.open_control()
    wait_until(lambda: not uapi.list_areas(control), "the area is gone", LONG)
    os.close(control)
    assert os.pwrite(fd, page_bytes(3), 3 * PAGE) == PAGE
    assert os.pread(fd, PAGE, 3 * PAGE) == page_bytes(3)
    os.close(fd)
