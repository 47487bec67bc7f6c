# SPDX-License-Identifier: GPL-2.0-or-later
"""Trap 4: the module cannot go while anything of it is in use, and can when nothing is."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from pyumem import uapi
from pyumem.area import Area

from .support import PAGE, Agent, areas, content, module_refs, serve, take_pages, wait_until

MODULE = Path(os.environ.get("UMEM_BUILD", "build")) / "kmod" / os.environ.get("UMEM_KERNEL", "6.1")


def unload() -> bool:
    done = subprocess.run(["rmmod", "umem"], check=False, capture_output=True, text=True)
    assert done.returncode == 0 or "in use" in done.stderr, done.stderr
    return done.returncode == 0


def load() -> None:
    subprocess.run(["insmod", MODULE / "umem.ko"], check=True)
    wait_until(Path(uapi.DEVICE).exists, "the control node is there")


def refused() -> None:
    if unload():
        load()
        raise AssertionError("the module went away while it was in use")


def test_it_goes_when_nothing_is_left_and_comes_back(agent: Agent) -> None:
    for _ in range(2):
        with Area.create("a", 4 * PAGE) as area:
            base = agent.map_node(area)
            serve(area, 0, 4)
            assert agent.word(base, 3) == content(3)
            agent.sys("munmap", base, area.size)
        assert module_refs() == 0
        assert unload()
        assert not Path(uapi.DEVICE).exists()
        assert not Path("/sys/class/umem").exists()
        load()
        assert areas() == []


def test_a_server_holds_it(area: Area) -> None:
    refused()
    assert area.info().served


def test_an_open_node_holds_it(area: Area, agent: Agent) -> None:
    agent.open(area.node)
    area.close()
    refused()


def test_a_mapping_holds_it(area: Area, agent: Agent) -> None:
    """The node's file is not that of the mapping, see vma_set_file()."""
    base = agent.map_node(area)
    serve(area, 0)
    area.close()
    refused()
    assert agent.word(base, 0) == content(0)
    agent.sys("munmap", base + 8 * PAGE, 8 * PAGE)
    refused()


def test_an_inherited_mapping_holds_it(area: Area, agent: Agent) -> None:
    base = agent.map_node(area)
    serve(area, 0, 64)
    (pid,) = agent.do("forkhold")
    area.close()
    agent.kill()
    agent.wait()
    try:
        refused()
        assert base
    finally:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: module_refs() == 0, "the child is gone")


def test_an_area_of_2012_holds_it() -> None:
    with contextlib.closing(os.fdopen(uapi.open_control(), "rb", 0)) as control:
        refused()
        made = uapi.init(control.fileno(), PAGE)
        os.close(made.shmem_fd)
        refused()
        mapping = mmap.mmap(control.fileno(), PAGE)
    refused()
    mapping.close()


def test_a_descriptor_of_the_backing_file_holds_it(area: Area) -> None:
    """Its write is ours.  The area is gone, and the file reads as before."""
    serve(area, 1)
    shmem = os.dup(area.shmem_fd)
    area.close()
    wait_until(lambda: not areas(), "the area is gone")
    refused()
    assert os.pread(shmem, 8, PAGE) == content(1).to_bytes(8, "little")
    os.close(shmem)
    wait_until(lambda: module_refs() == 0, "nothing holds the module")


def test_a_waiter_holds_it(area: Area, agent: Agent) -> None:
    """Mapping, node and server are gone, a thread sleeps in the driver's code: it must not go."""
    base = agent.map_node(area)
    pending = agent.touch_all(base, [5])
    assert take_pages(area, 1) == [5]
    refused()
    # In the order that leaves only the waiter: had it no reference, the module would go.
    area.close()
    agent.sys("munmap", base, 64 * PAGE)
    if not pending[0].done(0.3):
        refused()
    else:
        # It was woken to find its mapping gone.
        with pytest.raises(Exception, match="SIGSEGV"):
            pending[0].value()
    agent.kill()
    agent.wait()
    wait_until(lambda: module_refs() == 0, "nothing holds the module")


def test_unloading_races_with_use(agent: Agent) -> None:
    """rmmod while areas are made, mapped and dropped: either it is refused, or it went."""
    for n in range(4):
        with Area.create(f"race.{n}", 16 * PAGE) as area:
            base = agent.map_node(area)
            serve(area, 0, 16)
            agent.word(base, n)
        child = subprocess.Popen(["rmmod", "umem"], stderr=subprocess.DEVNULL)
        agent.sys("munmap", base, 16 * PAGE)
        if child.wait() == 0:
            load()
        time.sleep(0.01)
    assert areas() == []
