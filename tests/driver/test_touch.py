# SPDX-License-Identifier: GPL-2.0-or-later
"""UMEM_MARK_TOUCH: what is marked is mapped at once, so that the consumer does not fault again."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from pyumem.area import Area

from .support import PAGE, PROT_NONE, Agent, AgentSignal, content, fill, take_pages


def mapped(agent: Agent, base: int, pgoff: int) -> bool:
    """Is the page in the agent's page table?  By bit 63 of its /proc/PID/pagemap word."""
    with Path(f"/proc/{agent.pid}/pagemap").open("rb") as file:
        file.seek((base // PAGE + pgoff) * 8)
        return bool(int.from_bytes(file.read(8), "little") >> 63)


def faults(agent: Agent) -> int:
    """Minor and major faults of the agent's first slot so far."""
    tid = agent.tid(0)
    return int(agent.stat(tid, 10)) + int(agent.stat(tid, 12))


@pytest.fixture
def base(area: Area, agent: Agent) -> int:
    return agent.map_node(area)


def test_marked_pages_are_mapped_without_a_fault(area: Area, agent: Agent, base: int) -> None:
    fill(area, 0, 8)
    area.mark([(0, 4)])
    area.mark([(4, 4)], touch=True)
    assert [mapped(agent, base, page) for page in range(8)] == [False] * 4 + [True] * 4
    assert area.stats().nr_touched == 4
    agent.tid(0)
    before = faults(agent)
    assert agent.word(base, 5) == content(5)
    agent.do("poke", base + 6 * PAGE, 1)  # writing needs no fault either
    assert faults(agent) == before
    assert area.map[6 * PAGE] == 1
    assert agent.word(base, 1) == content(1)
    assert faults(agent) == before + 1  # the control: this one was not mapped


def test_what_is_cached_already_can_be_touched(area: Area, agent: Agent, base: int) -> None:
    fill(area, 3, 2)
    area.mark([(3, 2)])
    assert area.mark([(3, 2)], touch=True) == 0
    assert mapped(agent, base, 3) and mapped(agent, base, 4)


def test_who_waits_is_woken_all_the_same(area: Area, agent: Agent, base: int) -> None:
    pending = agent.touch_all(base, [9])
    assert take_pages(area, 1) == [9]
    fill(area, 9)
    assert area.mark([(9, 1)], touch=True) == 1
    assert pending[0].value() == content(9)


def test_missing_neighbours_stay_missing(area: Area, agent: Agent, base: int) -> None:
    fill(area, 10)
    area.mark([(10, 1)], touch=True)
    assert [page for page in range(64) if mapped(agent, base, page)] == [10]


def test_every_process_that_maps_it(
    area: Area, agent: Agent, base: int, new_agent: Callable[..., Agent]
) -> None:
    other = new_agent()
    elsewhere = other.map_node(area)
    child = agent.do("forkhold")[0]
    fill(area, 1)
    area.mark([(1, 1)], touch=True)
    assert mapped(agent, base, 1) and mapped(other, elsewhere, 1)
    assert area.stats().nr_touched == 3
    agent.sys("kill", child, signal.SIGKILL)
    agent.do("waitpid", child)


def test_what_cannot_be_mapped_is_left(area: Area, agent: Agent, base: int) -> None:
    """A mapping without access, a part that is unmapped, a consumer that is gone."""
    agent.sys("mprotect", base, 4 * PAGE, PROT_NONE)
    agent.sys("munmap", base + 4 * PAGE, 4 * PAGE)
    fill(area, 0, 12)
    assert area.mark([(0, 12)], touch=True) == 12
    assert [mapped(agent, base, page) for page in range(12)] == [False] * 8 + [True] * 4
    with pytest.raises(AgentSignal) as caught:
        agent.word(base, 0)
    assert caught.value.signum == signal.SIGSEGV
    agent.close()
    fill(area, 12)
    assert area.mark([(12, 1)], touch=True) == 1
