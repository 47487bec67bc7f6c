# SPDX-License-Identifier: GPL-2.0-or-later
"""What becomes of consumers when the server is gone is a policy: wait, or SIGBUS after a time."""

from __future__ import annotations

import errno
import signal
import time
from collections.abc import Iterator

import pytest

from pyumem import uapi
from pyumem.area import Area
from pyumem.errors import DriverError

from .support import (
    LONG,
    PAGE,
    SHORT,
    SLOW,
    Agent,
    AgentSignal,
    Pending,
    content,
    control,
    no_request,
    serve,
    take_pages,
)

TIMEOUT_MS = 400


@pytest.fixture
def area() -> Iterator[Area]:
    with Area.create("loss", 64 * PAGE, loss_timeout_ms=TIMEOUT_MS) as made:
        yield made


@pytest.fixture
def base(area: Area, agent: Agent) -> int:
    return agent.map_node(area)


def gets_sigbus(pending: Pending) -> float:
    """Wait for the end of a touch; return how many seconds that took."""
    start = time.monotonic()
    with pytest.raises(AgentSignal) as caught:
        pending.values()
    assert caught.value.signum == signal.SIGBUS
    return time.monotonic() - start


def test_who_waits_gets_sigbus_in_time(area: Area, agent: Agent, base: int) -> None:
    assert area.info().loss_timeout_ms == TIMEOUT_MS
    pending = agent.touch_all(base, [3, 4])
    assert not pending[0].done(2 * TIMEOUT_MS / 1000)  # as long as there is a server it waits
    area.close()
    took = gets_sigbus(pending[0])
    gets_sigbus(pending[1])
    assert TIMEOUT_MS / 1000 - 0.1 < took < LONG / 2


def test_a_late_touch_does_not_wait(area: Area, agent: Agent, base: int) -> None:
    serve(area, 1)
    area.close()
    time.sleep(1.5 * TIMEOUT_MS / 1000)
    start = time.monotonic()
    with pytest.raises(AgentSignal):
        agent.word(base, 2)
    assert time.monotonic() - start < TIMEOUT_MS / 1000 + 0.5 * SLOW
    assert agent.word(base, 1) == content(1)  # what is there is there


def test_a_successor_in_time_saves_them(area: Area, agent: Agent, base: int) -> None:
    pending = agent.touch_all(base, [5])
    assert take_pages(area, 1) == [5]
    number = area.id
    area.close()
    with Area.reattach(number) as successor:
        assert take_pages(successor, 1) == [5]
        assert not pending[0].done(2 * TIMEOUT_MS / 1000)
        serve(successor, 5)
        assert pending[0].value() == content(5)
        assert successor.stats().nr_lost == 0


def test_after_sigbus_a_successor_still_serves(area: Area, agent: Agent, base: int) -> None:
    pending = agent.touch_all(base, [5])
    number = area.id
    area.close()
    gets_sigbus(pending[0])
    with Area.reattach(number) as successor:
        assert take_pages(successor, 1) == [5]
        assert successor.stats().nr_lost == 1
        serve(successor, 5)
        assert agent.word(base, 5) == content(5)


def test_the_policy_can_be_changed(area: Area, agent: Agent, base: int) -> None:
    area.set_loss_policy(0)
    assert area.info().loss_timeout_ms == 0
    pending = agent.touch_all(base, [6])
    number = area.id
    area.close()
    assert not pending[0].done(2 * TIMEOUT_MS / 1000)  # waits for ever now
    with Area.reattach(number) as successor:
        successor.set_loss_policy(TIMEOUT_MS)
    gets_sigbus(pending[0])


def test_bad_arguments(area: Area) -> None:
    with pytest.raises(OSError) as caught:
        uapi._call(area.server_fd, uapi.UMEM_SET_LOSS_POLICY, bytearray(b"\1\0\0\0\1\0\0\0"))
    assert caught.value.errno == errno.EINVAL
    no_request(area, SHORT / 10)


def test_a_fenced_server_cannot_change_it(area: Area) -> None:
    with Area.reattach(area.id, force=True):
        with pytest.raises(DriverError) as caught:
            area.set_loss_policy(1)
        assert caught.value.errno == errno.ENODEV


def test_before_init_there_is_nothing_to_set() -> None:
    with control() as fd:
        for call in (uapi.stats, uapi.make_vma_anonymous):
            with pytest.raises(DriverError) as caught:
                call(fd)
            assert caught.value.errno == errno.ENXIO
