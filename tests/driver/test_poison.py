# SPDX-License-Identifier: GPL-2.0-or-later
"""Content that is lost for good: who needs it gets SIGBUS, nobody else is hurt."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from pathlib import Path

import pytest

from pyumem import uapi
from pyumem.area import Area
from pyumem.errors import DriverError
from tests.vm.guest import GuestSpec

from .build import program
from .support import (
    PAGE,
    SHORT,
    Agent,
    AgentError,
    AgentSignal,
    Server,
    content,
    no_request,
    serve,
    take,
    take_pages,
    wait_until,
)


def poison(area: Area, pgoff: int, count: int = 1) -> int:
    return area.mark([(pgoff, count)], poison=True)


@pytest.fixture
def base(area: Area, agent: Agent) -> int:
    return agent.map_node(area)


def sigbus(agent: Agent, base: int, pgoff: int) -> None:
    with pytest.raises(AgentSignal) as caught:
        agent.word(base, pgoff)
    assert caught.value.signum == signal.SIGBUS


def test_a_touch_gets_sigbus_and_is_not_asked_for(area: Area, agent: Agent, base: int) -> None:
    serve(area, 4)
    assert poison(area, 3, 3) == 2  # page 4 is cached and stays so
    for page in (3, 5):
        sigbus(agent, base, page)
    assert agent.word(base, 4) == content(4)
    no_request(area)
    stats = area.stats()
    assert (stats.nr_poisoned, stats.nr_poison_hits) == (2, 2)
    assert not area.info().complete


def test_who_waits_already_is_woken(area: Area, agent: Agent, base: int) -> None:
    pending = agent.touch_all(base, [7, 7, 8])
    assert take_pages(area, 2) == [7, 8]
    poison(area, 7)
    for waiter in pending[:2]:
        with pytest.raises(AgentSignal) as caught:
            waiter.values()
        assert caught.value.signum == signal.SIGBUS
    assert not pending[2].done(SHORT)
    serve(area, 8)
    assert pending[2].value() == content(8)


def test_a_system_call_gets_efault(area: Area, agent: Agent, base: int) -> None:
    poison(area, 2)
    (ends,) = agent.do("alloc", PAGE)
    agent.sys("pipe", ends)
    with pytest.raises(AgentError) as caught:
        agent.sys("write", agent.do("peek", ends)[0] >> 32, base + 2 * PAGE, PAGE)
    assert caught.value.errno == errno.EFAULT


def test_content_that_is_found_after_all(area: Area, agent: Agent, base: int) -> None:
    poison(area, 6)
    sigbus(agent, base, 6)
    assert serve(area, 6) == 1
    assert agent.word(base, 6) == content(6)
    assert poison(area, 6) == 0  # what is cached cannot be lost any more
    assert agent.word(base, 6) == content(6)


def test_the_bitmap_tells_and_a_successor_knows(area: Area) -> None:
    poison(area, 0, 2)
    poison(area, 63)
    with Area.reattach(area.id, force=True) as successor:
        assert list(successor.bitmap(uapi.UMEM_BITMAP_POISONED)) == [1 << 63 | 0b11]


@pytest.mark.parametrize(("pgoff", "count"), [(0, 0), (64, 1), (63, 2), (1 << 63, 1 << 63)])
def test_bad_ranges_are_refused(area: Area, pgoff: int, count: int) -> None:
    with pytest.raises(DriverError) as caught:
        poison(area, pgoff, count)
    assert caught.value.errno == errno.EINVAL
    assert area.stats().nr_poisoned == 0


def test_a_virtual_machine_gets_it_as_a_hardware_error(area: Area) -> None:
    """KVM hands a poisoned page on as SIGBUS with BUS_MCEERR_AR, of which QEMU makes an MCE."""
    poison(area, 1)
    with subprocess.Popen(
        [program("kvm_touch"), area.node, "64", "plain"], stdout=subprocess.PIPE, text=True
    ) as vm:
        assert vm.stdout is not None
        assert vm.stdout.readline().strip() == "running"
        assert take(area, 1)[0][0] == 0
        serve(area, 0)
        assert vm.stdout.readline().strip() == "0 good"
        assert vm.stdout.readline().strip() == "1 poisoned"


@pytest.mark.one_kernel
@pytest.mark.timeout(400)
def test_qemu_makes_a_machine_check_of_it(tmp_path: Path) -> None:
    """The guest's kernel learns which page of its memory is lost; QEMU and its VM live on.

    The guest boots on an area whose server has nothing but zeros.  QEMU, its firmware and the
    guest's kernel have touched what they load by the time that its workload has half of its
    memory: who asks then is the vCPU.
    """
    spec = GuestSpec(workload="verify", mb=96, memory="192M", virtio=True)
    serial, log = tmp_path / "serial", tmp_path / "log"
    lost: list[int] = []

    def answer(area: Area, pgoff: int) -> bool:
        if lost or area.info().nr_cached < 96 * 256:
            return True
        lost.append(pgoff)
        poison(area, pgoff)
        return False

    with Area.create("ram", 192 << 20) as ram:
        backend = f"memory-backend-file,id=ram0,mem-path={ram.node},share=on,size={ram.size}"
        argv = [os.environ["UMEM_QEMU"], *spec.qemu_args(serial), "-object", backend]
        argv += ["-machine", "q35,memory-backend=ram0"]
        with (
            log.open("w") as said,
            Server(ram, answer),
            subprocess.Popen(argv, stdout=said, stderr=said) as qemu,
        ):
            try:
                wait_until(lambda: "BUS_MCEERR_AR" in log.read_text(), "QEMU is told", 300)
            finally:
                qemu.kill()
    assert f"GUEST addr 0x{lost[0] * PAGE:x} of type BUS_MCEERR_AR injected" in log.read_text()
