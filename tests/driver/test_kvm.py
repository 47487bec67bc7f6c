# SPDX-License-Identifier: GPL-2.0-or-later
"""A virtual machine as the consumer: faults that may not sleep, and their kernel threads.

Whole guests are tested in tests/migration; here KVM's asynchronous page fault is provoked with a
guest of seven instructions, so that each step can be looked at.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyumem import uapi
from pyumem.area import Area

from .build import program
from .support import LONG, SHORT, SLOW, Server, no_request, serve, take, wait_until

NPAGES = 64
Machine = Callable[[str], subprocess.Popen[str]]


@pytest.fixture
def machine(area: Area) -> Iterator[Machine]:
    """Return a function that starts the machine on the area and waits until it runs."""
    assert Path("/dev/kvm").exists(), "the test machine has no KVM"
    started: list[subprocess.Popen[str]] = []

    def start(kind: str) -> subprocess.Popen[str]:
        # Off the first processor: Documentation/testing.rst, Traps of the emulation.
        words = ["taskset", "--cpu-list", "1-63"] if len(os.sched_getaffinity(0)) > 1 else []
        words += [str(program("kvm_touch")), area.node, str(NPAGES), kind]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert line(process) == "running"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def line(process: subprocess.Popen[str], timeout: float = LONG) -> str | None:
    """The next line that it says; None when it says nothing in so many seconds."""
    assert process.stdout is not None
    if not select.select([process.stdout], [], [], timeout)[0]:
        return None
    return process.stdout.readline().strip()


def test_a_fault_that_may_not_sleep_is_queued_with_its_flag(area: Area, machine: Machine) -> None:
    vm = machine("irqchip")
    for page in range(4):
        assert take(area, 1) == [(page, uapi.UMEM_REQUEST_ASYNC)]
        assert line(vm, SHORT) is None
        assert not waits_itself(vm)
        no_request(area, within=0.02)  # the kernel thread that waits asks for nothing new
        serve(area, page)
        assert line(vm) == f"{page} good"


def waits_itself(vm: subprocess.Popen[str]) -> bool:
    """Does the processor's own thread sleep in the driver?"""
    return "umem_" in Path(f"/proc/{vm.pid}/stack").read_text()


def test_without_an_interrupt_controller_the_thread_waits(area: Area, machine: Machine) -> None:
    """The control of the test above.  KVM first asks without sleeping here too."""
    vm = machine("plain")
    for page in range(2):
        assert take(area, 1) == [(page, uapi.UMEM_REQUEST_ASYNC)]
        wait_until(lambda: waits_itself(vm), "the thread waits")
        assert line(vm, SHORT) is None
        serve(area, page)
        assert line(vm) == f"{page} good"


@pytest.mark.parametrize("kind", ["irqchip", "plain"])
def test_a_whole_run(area: Area, machine: Machine, kind: str) -> None:
    serve(area, 10, 5)
    vm = machine(kind)
    with Server(area) as server:
        for page in range(NPAGES):
            assert line(vm) == f"{page} good"
        assert vm.wait(LONG) == 0
    assert server.served == [page for page in range(NPAGES) if not 10 <= page < 15]


@pytest.mark.parametrize("kind", ["irqchip", "plain"])
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_machine_that_waits_can_be_killed(
    area: Area, machine: Machine, kind: str, signum: signal.Signals
) -> None:
    """Trap 6: its kernel thread takes no signal, and its exit waits for that thread."""
    vm = machine(kind)
    take(area, 1)
    time.sleep(SHORT)
    began = time.monotonic()
    vm.send_signal(signum)
    assert vm.wait(LONG) == -signum
    assert time.monotonic() - began < 5 * SLOW
    wait_until(lambda: not area.info().mapped, "the mapping is gone")
    serve(area, 0, NPAGES)


def test_the_server_dies_under_a_machine(area: Area, machine: Machine) -> None:
    vm = machine("irqchip")
    take(area, 1)
    area.close()
    assert line(vm, SHORT) is None
    with Area.reattach(area.id) as successor:
        # Delivered again; the walk that finds it does not know who waits.
        assert [pgoff for pgoff, _ in take(successor, 1)] == [0]
        with Server(successor):
            serve(successor, 0)
            for page in range(NPAGES):
                assert line(vm) == f"{page} good"
        assert vm.wait(LONG) == 0


def test_killed_with_its_server_gone(area: Area, machine: Machine) -> None:
    """Nobody can mark any more: the kernel thread has to give up by itself."""
    vm = machine("irqchip")
    take(area, 1)
    area.close()
    vm.kill()
    assert vm.wait(LONG) == -signal.SIGKILL
