# SPDX-License-Identifier: GPL-2.0-or-later
"""pyumem.discover and sysfs, on real areas."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyumem import discover, uapi
from pyumem.area import Area
from pyumem.errors import DriverError

from .support import PAGE, SLOW, Agent, areas, serve, take


@pytest.fixture(params=["as it is", "kernel events"])
def events(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "kernel events":
        monkeypatch.setattr(discover, "UDEV_CONTROL", Path("/nonexistent"))
    yield


def test_nodes_say_what_the_driver_says(area: Area, agent: Agent) -> None:
    with Area.create("other", PAGE) as other:
        agent.touch(agent.map_node(area), 3, slot=1)
        take(area, 1)
        serve(area, 7, 2)
        one, two = discover.list_nodes()
        known = area.info()
        assert one == discover.Node(
            id=area.id,
            path=area.node,
            name=area.name,
            size=area.size,
            granule_size=PAGE,
            cached=2,
            delivered=1,
            served=True,
            server_pid=os.getpid(),
        )
        assert (one.cached, one.delivered) == (known.nr_cached, known.nr_delivered)
        assert (two.id, two.name) == (other.id, "other")
    assert [node.id for node in discover.list_nodes()] == [area.id]


def test_a_node_without_a_server_says_so(area: Area, agent: Agent) -> None:
    fd = agent.open(area.node)
    area.close()
    (node,) = discover.list_nodes()
    assert (node.served, node.server_pid) == (False, 0)
    agent.sys("close", fd)
    assert discover.list_nodes() == []


def test_areas_of_2012_have_no_node() -> None:
    fd = uapi.open_control()
    try:
        os.close(uapi.init(fd, PAGE).shmem_fd)
        assert len(areas()) == 1
        assert discover.list_nodes() == []
    finally:
        os.close(fd)


@pytest.mark.usefixtures("events")
def test_a_node_that_is_there(area: Area) -> None:
    began = time.monotonic()
    assert discover.wait_for_node(area.id, 20) == Path(area.node)
    assert time.monotonic() - began < 10 * SLOW


@pytest.mark.usefixtures("events")
def test_a_node_that_comes(new_area: Callable[[int], Area]) -> None:
    """Its number is known beforehand: numbers are given in turn."""
    first = new_area(1)
    number = first.id + 1
    made: list[Area] = []
    timer = threading.Timer(0.3, lambda: made.append(new_area(1)))
    timer.start()
    assert discover.wait_for_node(number, 20) == Path(f"/dev/umem{number}")
    timer.join()
    assert made[0].id == number


@pytest.mark.usefixtures("events")
def test_a_node_that_does_not_come() -> None:
    with pytest.raises(DriverError) as caught:
        discover.wait_for_node(1 << 19, 0.3)
    assert caught.value.errno == errno.ENOENT


@pytest.mark.usefixtures("events")
def test_a_node_of_somebody_else(area: Area) -> None:
    groups = os.getgroups()
    os.setgroups([])
    os.setegid(4321)
    os.seteuid(4321)
    try:
        with pytest.raises(DriverError) as caught:
            discover.wait_for_node(area.id, 0.3)
        assert caught.value.errno == errno.EACCES
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)
    assert discover.wait_for_node(area.id, 5)
