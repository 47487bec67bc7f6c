# SPDX-License-Identifier: GPL-2.0-or-later
"""How a consumer waits: signals, kernel-mode accesses, debuggers, core dumps, fork."""

from __future__ import annotations

import errno
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyumem.area import Area

from .support import (
    MADV_POPULATE_READ,
    MADV_POPULATE_WRITE,
    MASK,
    PAGE,
    SHORT,
    SLOW,
    WORDS,
    Agent,
    AgentError,
    Pending,
    Server,
    content,
    no_request,
    page_bytes,
    serve,
    take_pages,
    wait_until,
)

FUTEX_WAIT, FUTEX_WAKE = 0, 1


@pytest.fixture
def base(area: Area, agent: Agent) -> int:
    """Where the agent has the area."""
    return agent.map_node(area)


def pipe(agent: Agent) -> tuple[int, int]:
    """Return the reading and the writing end of a pipe of the agent."""
    (where,) = agent.do("alloc", PAGE)
    agent.sys("pipe", where)
    both = agent.do("peek", where)[0]
    return both & 0xFFFFFFFF, both >> 32


def kernel_access(agent: Agent, address: int, slot: int) -> Pending:
    """Have the kernel read a page of the agent on its behalf: write(2) to a pipe."""
    return agent.start("sys", "write", pipe(agent)[1], address, PAGE, slot=slot)


def test_a_write_fault_waits_too(area: Area, agent: Agent, base: int) -> None:
    pending = agent.start("poke", base + 5 * PAGE + 8, 77, slot=1)
    assert take_pages(area, 1) == [5]
    assert not pending.done(SHORT)
    serve(area, 5)
    pending.values()
    assert agent.do("words", base + 5 * PAGE, 3, 8) == [content(5), 77, content(5)]
    assert area.map[5 * PAGE + 8] == 77  # one copy of the page, shared


def test_no_increment_is_lost(area: Area, agent: Agent, base: int) -> None:
    """Eight threads add to the same word of a page that is still missing."""
    pending = [agent.start("add", base + 4 * PAGE, n, slot=n) for n in range(1, 9)]
    assert take_pages(area, 1) == [4]
    serve(area, 4)
    for p in pending:
        p.values()
    assert agent.word(base, 4) == (content(4) + sum(range(1, 9))) & MASK


@pytest.mark.parametrize("access", ["user", "kernel"])
def test_a_waiter_can_be_killed(area: Area, agent: Agent, base: int, access: str) -> None:
    if access == "user":
        agent.touch(base, 3, slot=1)
    else:
        kernel_access(agent, base + 3 * PAGE, slot=1)
    assert take_pages(area, 1) == [3]
    began = time.monotonic()
    agent.kill()
    assert agent.wait() == -signal.SIGKILL
    assert time.monotonic() - began < 5 * SLOW
    wait_until(lambda: not area.info().mapped, "the mapping is gone")
    serve(area, 3)  # nobody waits for it any more


def test_an_orderly_exit_with_waiters(agent: Agent, area: Area, base: int) -> None:
    for slot in range(1, 5):
        agent.touch(base, slot, slot)
    take_pages(area, 4)
    agent.hang_up()
    assert agent.wait() == 0


def test_a_handler_runs_while_the_page_is_missing(area: Area, agent: Agent, base: int) -> None:
    """Trap 3, the other half: killable alone would leave SIGALRM and gdb hanging."""
    agent.tid(1)
    pending = agent.touch(base, 6, slot=1)
    take_pages(area, 1)
    for n in range(1, 6):
        agent.do("tkill", 1, int(signal.SIGUSR1))
        wait_until(lambda n=n: agent.do("signals")[0] == n, "the handler ran")  # type: ignore[misc]
        assert not pending.done()
    no_request(area)  # the retries ask for nothing new
    serve(area, 6)
    assert pending.value() == content(6)


def test_a_waiter_can_be_stopped_and_goes_on(area: Area, agent: Agent, base: int) -> None:
    tid = agent.tid(1)
    pending = agent.touch(base, 6, slot=1)
    take_pages(area, 1)
    agent.wait_asleep(tid)
    agent.kill(signal.SIGSTOP)
    wait_until(lambda: agent.stat(tid, 3) == "T", "the thread is stopped")
    serve(area, 6)
    assert not pending.done(0.05)
    agent.kill(signal.SIGCONT)
    assert pending.value() == content(6)


@pytest.mark.parametrize("access", ["write", "madvise", "read"])
def test_a_signal_storm_does_not_make_a_kernel_access_spin(
    area: Area, agent: Agent, base: int, access: str
) -> None:
    """Trap 3.  With TASK_INTERRUPTIBLE whenever the flag allows it this takes 100 % of a CPU."""
    tid = agent.tid(1)
    address = base + 9 * PAGE
    if access == "write":
        pending = kernel_access(agent, address, slot=1)
    elif access == "madvise":
        pending = agent.start("sys", "madvise", address, PAGE, MADV_POPULATE_READ, slot=1)
    else:
        fd = agent.open("/dev/zero")
        pending = agent.start("sys", "read", fd, address + 8, PAGE - 8, slot=1)
    assert take_pages(area, 1) == [9]
    agent.wait_asleep(tid)
    before, began = agent.do("cpu", 1)[0], time.monotonic()
    storm = agent.start("storm", 1, int(signal.SIGUSR1), 2000, 300, slot=2)
    assert storm.value() == 300
    used = (agent.do("cpu", 1)[0] - before) / 1e9
    wall = time.monotonic() - began
    assert used < 0.1 * wall, f"{used:.3f} s of CPU in {wall:.3f} s"
    assert agent.do("cpu", 2)[0] > 0  # the clock does count
    serve(area, 9)
    if access == "write":
        assert pending.value() == PAGE
    elif access == "read":
        assert pending.value() == PAGE - 8
        assert agent.do("words", address, 3, 8) == [content(9), 0, 0]
    else:
        try:
            pending.value()
        except AgentError as e:  # madvise() may be interrupted, it must not fail otherwise
            assert e.errno == errno.EINTR
    assert agent.do("signals")[0] > 0


def test_a_storm_on_a_user_access_ends_well(area: Area, agent: Agent, base: int) -> None:
    """Retried for every signal, it still gets its page, and asks for it once."""
    pending = agent.touch(base, 12, slot=1)
    take_pages(area, 1)
    storm = agent.start("storm", 1, int(signal.SIGUSR1), 1000, 150, slot=2)
    time.sleep(0.05)
    assert not pending.done()
    serve(area, 12)
    assert pending.value() == content(12)
    storm.values()
    no_request(area, within=0.05)


def test_files_are_read_into_a_missing_page(
    area: Area, agent: Agent, base: int, tmp_path: Path
) -> None:
    """Half of the page from the file, the other half from the server."""
    data = os.urandom(PAGE // 2)
    (tmp_path / "data").write_bytes(data)
    fd = agent.open(str(tmp_path / "data"))
    pending = agent.start("sys", "read", fd, base + 20 * PAGE, PAGE // 2, slot=1)
    assert take_pages(area, 1) == [20]
    assert not pending.done(SHORT)
    serve(area, 20)
    assert pending.value() == PAGE // 2
    assert area.map[20 * PAGE : 21 * PAGE] == data + page_bytes(20)[: PAGE // 2]


def test_direct_io_into_a_missing_page(area: Area, agent: Agent, base: int, ram_disk: Path) -> None:
    """GUP pins the page: it waits, and the device's data lands in the page that everybody has."""
    data = os.urandom(2 * PAGE)
    ram_disk.write_bytes(data)
    os.sync()
    fd = agent.open(str(ram_disk), os.O_RDONLY | os.O_DIRECT)
    pending = agent.start("sys", "pread", fd, base + 30 * PAGE, 2 * PAGE, 0, slot=1)
    assert take_pages(area, 1) == [30]
    assert not pending.done(SHORT)
    serve(area, 30)
    with Server(area):
        assert pending.value() == 2 * PAGE
    assert area.map[30 * PAGE : 32 * PAGE] == data
    assert agent.do("peek", base + 30 * PAGE)[0] == int.from_bytes(data[:8], "little")


def test_direct_io_out_of_a_missing_page(
    area: Area, agent: Agent, base: int, ram_disk: Path
) -> None:
    fd = agent.open(str(ram_disk), os.O_RDWR | os.O_DIRECT)
    pending = agent.start("sys", "pwrite", fd, base + 33 * PAGE, PAGE, 3 * PAGE, slot=1)
    assert take_pages(area, 1) == [33]
    assert not pending.done(SHORT)
    serve(area, 33)
    assert pending.value() == PAGE
    with ram_disk.open("rb") as disk:
        disk.seek(3 * PAGE)
        assert disk.read(PAGE) == page_bytes(33)


@pytest.mark.parametrize("advice", [MADV_POPULATE_READ, MADV_POPULATE_WRITE])
def test_populating_waits(area: Area, agent: Agent, base: int, advice: int) -> None:
    pending = agent.start("sys", "madvise", base + 8 * PAGE, 4 * PAGE, advice, slot=1)
    assert take_pages(area, 1) == [8]
    assert not pending.done(SHORT)
    serve(area, 8)
    with Server(area) as server:
        assert pending.value() == 0
    assert sorted(server.served) == [9, 10, 11]
    assert agent.do("words", base + 8 * PAGE, 4, PAGE) == [content(n) for n in range(8, 12)]


def test_locking_memory_waits_and_can_be_killed(area: Area, agent: Agent, base: int) -> None:
    agent.start("sys", "mlock", base, 4 * PAGE, slot=1)
    assert take_pages(area, 1) == [0]
    agent.kill()
    assert agent.wait() == -signal.SIGKILL


def test_a_futex_in_a_missing_page(area: Area, agent: Agent, base: int) -> None:
    """FUTEX_WAIT waits for the page, compares with its content, sleeps, and is woken."""
    word = content(17) & 0xFFFFFFFF
    address = base + 17 * PAGE
    tid = agent.tid(1)
    right = agent.start("sys", "futex", address, FUTEX_WAIT, word, 0, slot=1)
    assert take_pages(area, 1) == [17]
    wrong = agent.start("sys", "futex", address, FUTEX_WAIT, word ^ 1, 0, slot=2)
    assert not wrong.done(SHORT)
    serve(area, 17)
    with pytest.raises(AgentError) as caught:
        wrong.value()
    assert caught.value.errno == errno.EAGAIN
    in_futex = Path(f"/proc/{agent.pid}/task/{tid}/syscall")
    wait_until(
        lambda: f"0x{address:x}" in in_futex.read_text() and agent.stat(tid, 3) == "S", "it sleeps"
    )
    woken = wait_until(lambda: agent.sys("futex", address, FUTEX_WAKE, 1), "somebody is woken")
    assert woken == 1
    assert right.value() == 0


@pytest.mark.parametrize("call", ["process_vm_readv", "process_vm_writev"])
def test_access_from_another_process_waits(
    area: Area, agent: Agent, base: int, new_agent: Callable[..., Agent], call: str
) -> None:
    """As QEMU's or a debugger's: GUP on the consumer's mm, on behalf of somebody else."""
    other = new_agent()
    (local,) = other.do("alloc", PAGE)
    other.do("fill", local, WORDS, 5)
    (vectors,) = other.do("alloc", PAGE)
    for n, word in enumerate((local, PAGE, base + 25 * PAGE, PAGE)):
        other.do("poke", vectors + 8 * n, word)
    arguments = (agent.pid, vectors, 1, vectors + 16, 1, 0)
    pending = other.start("sys", call, *arguments, slot=1)
    assert take_pages(area, 1) == [25]
    assert not pending.done(SHORT)
    serve(area, 25)
    assert pending.value() == PAGE
    if call == "process_vm_readv":
        assert other.do("same", local, WORDS, content(25)) == [WORDS]
    else:
        assert agent.page_is(base, 25, 5)


def test_access_from_another_process_can_be_killed(
    area: Area, agent: Agent, base: int, new_agent: Callable[..., Agent]
) -> None:
    other = new_agent()
    (vectors,) = other.do("alloc", PAGE)
    for n, word in enumerate((vectors + 64, 8, base, 8)):
        other.do("poke", vectors + 8 * n, word)
    other.start("sys", "process_vm_readv", agent.pid, vectors, 1, vectors + 16, 1, 0, slot=1)
    assert take_pages(area, 1) == [0]
    other.kill()
    assert other.wait() == -signal.SIGKILL
    serve(area, 0)
    assert agent.word(base, 0) == content(0)


def test_proc_mem_of_a_missing_page_is_an_error(
    area: Area, agent: Agent, base: int, new_agent: Callable[..., Agent]
) -> None:
    """Trap 5: an access that cannot be retried fails, it neither hangs nor makes up zeros."""
    serve(area, 1)
    other = new_agent()
    mem = other.open(f"/proc/{agent.pid}/mem")
    (room,) = other.do("alloc", PAGE)
    pending = other.start("sys", "pread", mem, room, PAGE, base + 2 * PAGE, slot=1)
    with pytest.raises(AgentError) as caught:
        pending.value(timeout=5 * SLOW)
    assert caught.value.errno == errno.EIO
    assert other.sys("pread", mem, room, PAGE, base + PAGE) == PAGE
    assert other.do("same", room, WORDS, content(1)) == [WORDS]
    serve(area, 2)
    assert other.sys("pread", mem, room, PAGE, base + 2 * PAGE) == PAGE
    assert other.do("same", room, WORDS, content(2)) == [WORDS]


@pytest.fixture
def core_file(tmp_path: Path) -> Iterator[Path]:
    """Core dumps go to this file for the time of the test."""
    pattern = Path("/proc/sys/kernel/core_pattern")
    before = pattern.read_text()
    core = tmp_path / "core"
    pattern.write_text(str(core))
    yield core
    pattern.write_text(before)


@pytest.mark.parametrize("waiting", ["nobody", "user", "kernel"])
def test_a_core_dump_finishes(
    area: Area, agent: Agent, base: int, core_file: Path, waiting: str
) -> None:
    """Trap 5.  Missing pages are left out of it, cached ones are in it."""
    serve(area, 11)
    Path(f"/proc/{agent.pid}/coredump_filter").write_text("0x7f")  # shared memory too
    resource.prlimit(agent.pid, resource.RLIMIT_CORE, (1 << 30, 1 << 30))
    if waiting == "user":
        agent.touch(base, 40, slot=1)
        take_pages(area, 1)
    elif waiting == "kernel":
        kernel_access(agent, base + 40 * PAGE, slot=1)
        take_pages(area, 1)
    agent.kill(signal.SIGABRT)
    assert agent.wait() == -signal.SIGABRT
    core = core_file.read_bytes()
    assert core.startswith(b"\x7fELF")
    assert page_bytes(11) in core, f"{len(core)} bytes"
    no_request(area, within=0.05)


def test_a_child_waits_like_its_parent(area: Area, agent: Agent, base: int) -> None:
    serve(area, 1)
    assert agent.do("forkpeek", base + PAGE) == [content(1)]
    child = agent.start("forkpeek", base + 2 * PAGE, slot=1)
    assert take_pages(area, 1) == [2]
    parent = agent.touch(base, 2, slot=2)
    assert not child.done(SHORT)
    assert not parent.done()
    serve(area, 2)
    assert child.value() == content(2)
    assert parent.value() == content(2)


def test_a_child_outlives_its_parent(area: Area, agent: Agent, base: int) -> None:
    """Then the child's mapping alone keeps the area; killed while it waits, it lets go."""
    (pid,) = agent.do("forkexpect", base + 3 * PAGE, content(3))
    assert take_pages(area, 1) == [3]
    agent.kill()
    agent.wait()
    assert area.info().mapped
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not area.info().mapped, "the child's mapping is gone")


def test_children_get_what_was_served(area: Area, agent: Agent, base: int) -> None:
    pids = [agent.do("forkexpect", base + n * PAGE, content(n))[0] for n in range(5, 15)]
    with Server(area):
        for pid in pids:
            assert agent.do("waitpid", pid) == [0]
    # The negative control: a child that expects something else says so.
    (pid,) = agent.do("forkexpect", base + 5 * PAGE, 12345)
    assert agent.do("waitpid", pid) == [1 << 8]


def test_the_mapping_goes_away_under_a_waiter(area: Area, agent: Agent, base: int) -> None:
    """Trap 7: after the wait the fault is looked up anew, and finds nothing."""
    pending = agent.touch(base, 13, slot=1)
    take_pages(area, 1)
    agent.sys("munmap", base, area.size)
    serve(area, 13)
    with pytest.raises(Exception, match="SIGSEGV"):
        pending.value()


def test_the_area_goes_away_under_a_waiter(area: Area, agent: Agent, base: int) -> None:
    """Trap 7: mapping, node and server are gone while a thread still sleeps for a page."""
    pending = agent.touch(base, 13, slot=1)
    take_pages(area, 1)
    agent.sys("munmap", base, area.size)
    area.close()
    time.sleep(0.05)
    if pending.done():
        with pytest.raises(Exception, match="SIGSEGV"):
            pending.value()
    agent.kill()
    assert agent.wait() == -signal.SIGKILL
