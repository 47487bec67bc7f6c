# SPDX-License-Identifier: GPL-2.0-or-later
"""A NUMA policy of the consumer's mapping holds for what the server fills.

The test machine has two nodes, made of one by numa=fake=2.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from pyumem.area import Area

from .support import PAGE, Agent, serve, write

NPAGES = 64
MPOL_BIND, MPOL_INTERLEAVE = 2, 3


def by_node(agent: Agent, base: int) -> dict[int, int]:
    """Pages of the mapping at BASE that the agent has touched, by node."""
    for line in Path(f"/proc/{agent.pid}/numa_maps").read_text().splitlines():
        if int(line.split()[0], 16) == base:
            return {int(node): int(nr) for node, nr in re.findall(r"\bN(\d+)=(\d+)", line)}
    raise AssertionError("the mapping is not in numa_maps")


def bind(agent: Agent, base: int, policy: int, nodes: int, npages: int = NPAGES) -> None:
    (mask,) = agent.do("alloc", 8)
    agent.do("poke", mask, nodes)
    agent.sys("mbind", base, npages * PAGE, policy, mask, 64, 0)


def test_the_machine_has_two_nodes() -> None:
    assert Path("/sys/devices/system/node/online").read_text().strip() == "0-1"


@pytest.mark.parametrize("how", [write, serve], ids=["written", "in-place"])
@pytest.mark.parametrize("node", [0, 1])
def test_bound_memory_is_filled_on_its_node(
    area: Area, agent: Agent, node: int, how: Callable[[Area, int, int], object]
) -> None:
    base = agent.map_node(area)
    bind(agent, base, MPOL_BIND, 1 << node)
    how(area, 0, NPAGES)
    for page in range(NPAGES):
        assert agent.word(base, page)
    assert by_node(agent, base) == {node: NPAGES}


def test_interleaved_memory_is_on_both(area: Area, agent: Agent) -> None:
    base = agent.map_node(area)
    bind(agent, base, MPOL_INTERLEAVE, 3)
    write(area, 0, NPAGES)
    for page in range(NPAGES):
        assert agent.word(base, page)
    assert by_node(agent, base) == {0: NPAGES // 2, 1: NPAGES // 2}


def test_a_policy_of_a_part_is_of_that_part(area: Area, agent: Agent) -> None:
    base = agent.map_node(area)
    bind(agent, base, MPOL_BIND, 1 << 0)
    bind(agent, base, MPOL_BIND, 1 << 1, NPAGES // 2)
    write(area, 0, NPAGES)
    for page in range(NPAGES):
        assert agent.word(base, page)
    assert by_node(agent, base) == {1: NPAGES // 2}
    assert by_node(agent, base + NPAGES // 2 * PAGE) == {0: NPAGES // 2}
