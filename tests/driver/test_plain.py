# SPDX-License-Identifier: GPL-2.0-or-later
"""UMEM_MAKE_VMA_ANONYMOUS: a complete area becomes plain shared memory."""

from __future__ import annotations

import errno
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from pyumem.area import Area
from pyumem.errors import DriverError

from .support import (
    MADV_DONTNEED,
    MADV_REMOVE,
    MREMAP_MAYMOVE,
    PAGE,
    Agent,
    content,
    module_refs,
    serve,
    wait_until,
)


def flags(agent: Agent, base: int) -> set[str]:
    """VmFlags of the mapping at this address."""
    return set(agent.smaps(base, "VmFlags"))


@pytest.fixture
def base(area: Area, agent: Agent) -> int:
    return agent.map_node(area)


def test_not_before_it_is_complete(area: Area, agent: Agent, base: int) -> None:
    serve(area, 0, 63)
    with pytest.raises(DriverError) as caught:
        area.make_anonymous()
    assert caught.value.errno == errno.EBUSY
    assert area.info().mapped
    assert "de" in flags(agent, base)  # still ours: may not be expanded


def test_the_driver_is_out_of_the_way(area: Area, agent: Agent, base: int) -> None:
    refs = module_refs()
    serve(area, 0, 64)
    assert agent.word(base, 5) == content(5)
    area.make_anonymous()
    area.make_anonymous()  # again is harmless
    assert not area.info().mapped
    assert module_refs() == refs - 1  # the mapping does not hold the module any more
    assert "de" not in flags(agent, base)
    for page in range(64):
        assert agent.word(base, page) == content(page)
    minor = area.stats().nr_minor
    agent.sys("madvise", base, area.size, MADV_DONTNEED)
    assert agent.word(base, 9) == content(9)
    assert area.stats().nr_minor == minor
    agent.do("poke", base + 9 * PAGE, 77)
    assert area.map[9 * PAGE] == 77


def test_it_is_shared_memory_like_any_other(area: Area, agent: Agent, base: int) -> None:
    serve(area, 0, 64)
    area.make_anonymous()
    agent.sys("mlock", base, 4 * PAGE)
    assert "lo" in flags(agent, base)
    agent.sys("madvise", base + 8 * PAGE, PAGE, MADV_REMOVE)
    assert agent.word(base, 8) == 0
    assert agent.word(base, 7) == content(7)
    agent.sys("munmap", base + 32 * PAGE, 32 * PAGE)
    moved = agent.sys("mremap", base + 16 * PAGE, 16 * PAGE, 16 * PAGE, MREMAP_MAYMOVE)
    assert agent.word(moved, 0) == content(16)
    assert agent.do("forkpeek", moved)[0] == content(16)


def test_in_every_process_and_every_mapping(
    area: Area, agent: Agent, base: int, new_agent: Callable[..., Agent]
) -> None:
    serve(area, 0, 63)
    others = [new_agent() for _ in range(3)]
    places = [(one, one.map_node(area)) for one in others for _ in range(2)]
    agent.sys("munmap", base + 8 * PAGE, 8 * PAGE)  # one mapping in two parts
    child = agent.do("forkhold")[0]
    serve(area, 63)
    area.make_anonymous()
    assert not area.info().mapped
    for one, where in [*places, (agent, base)]:
        assert "de" not in flags(one, where)
        assert one.word(where, 3) == content(3)
    agent.sys("kill", child, signal.SIGKILL)
    agent.do("waitpid", child)


def test_mappings_made_afterwards_are_plain_from_the_start(area: Area, agent: Agent) -> None:
    serve(area, 0, 64)
    base = agent.map_node(area)
    assert "de" not in flags(agent, base)
    assert not area.info().mapped
    assert agent.word(base, 11) == content(11)


def test_the_memory_outlives_the_server(area: Area, agent: Agent, base: int) -> None:
    serve(area, 0, 64)
    area.make_anonymous()
    node = Path(area.node)
    area.close()
    wait_until(lambda: not node.exists(), "the area is gone: nothing holds it any more")
    agent.do("poke", base, 5)
    assert agent.do("words", base, 3, PAGE) == [5, content(1), content(2)]
