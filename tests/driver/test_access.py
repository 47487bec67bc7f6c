# SPDX-License-Identifier: GPL-2.0-or-later
"""The rows of "What a consumer may do" in Documentation/driver.rst that no other file tests."""

from __future__ import annotations

import errno
import os
import platform
import re
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyumem.area import Area

from .build import program
from .support import (
    LONG,
    MADV_DONTNEED,
    MADV_HUGEPAGE,
    MADV_PAGEOUT,
    PAGE,
    SHORT,
    WORDS,
    Agent,
    AgentError,
    AgentSignal,
    Server,
    content,
    no_request,
    page_bytes,
    serve,
    take_pages,
    wait_until,
)

NPAGES = 64
DOCUMENT = Path(__file__).parents[2] / "Documentation/driver.rst"

PTRACE_PEEKDATA, PTRACE_POKEDATA, PTRACE_DETACH = 2, 5, 17
PTRACE_SEIZE, PTRACE_INTERRUPT = 0x4206, 0x4207
MADV_NORMAL, MADV_RANDOM, MADV_SEQUENTIAL, MADV_WILLNEED, MADV_FREE = 0, 1, 2, 3, 8
MADV_DONTFORK, MADV_DOFORK, MADV_MERGEABLE, MADV_UNMERGEABLE = 10, 11, 12, 13
MADV_NOHUGEPAGE, MADV_DONTDUMP, MADV_DODUMP = 15, 16, 17
MADV_WIPEONFORK, MADV_KEEPONFORK, MADV_COLD, MADV_DONTNEED_LOCKED = 18, 19, 20, 24
MADV_SOFT_OFFLINE = 101

Program = subprocess.Popen[str]
KERNEL = tuple(int(number) for number in re.findall(r"\d+", platform.release())[:2])


def test_the_table_names_tests_that_there_are() -> None:
    """Each row of the table says which test shows it."""
    text = DOCUMENT.read_text()
    table = text[text.index("What a consumer may do") : text.index("\nDiscard\n")]
    named = re.findall(r"``(test_\w+)::(test_\w+)``", table)
    assert len(named) > 30
    for module, test in named:
        source = (Path(__file__).parent / f"{module}.py").read_text()
        assert f"def {test}(" in source, f"{module}::{test}"


@pytest.fixture
def base(area: Area, agent: Agent) -> int:
    return agent.map_node(area)


@pytest.fixture
def started() -> Iterator[Callable[..., Program]]:
    """Return a function that starts a program; it is killed at the end."""
    programs: list[Program] = []

    def start(name: str, *args: object) -> Program:
        argv = [str(program(name)), *map(str, args)]
        programs.append(subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, bufsize=1))
        assert line(programs[-1]) == "goes"
        return programs[-1]

    yield start
    for one in programs:
        one.kill()
        one.communicate()


def line(process: Program, timeout: float = LONG) -> str | None:
    """The next line that it says; None when it says nothing in so many seconds."""
    assert process.stdout is not None
    if not select.select([process.stdout], [], [], timeout)[0]:
        return None
    return process.stdout.readline().strip()


def errno_of(agent: Agent, name: str, *args: int) -> int:
    """Do a system call that answers at once; return its errno, or 0."""
    pending = agent.start("sys", name, *args, slot=1)
    try:
        pending.value(timeout=5)
    except AgentError as e:
        assert e.errno is not None
        return e.errno
    return 0


# --- io_uring, vhost: the kernel's own threads ---


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Half a page of something."""
    path = tmp_path / "data"
    path.write_bytes(os.urandom(PAGE // 2))
    return path


@pytest.mark.parametrize("mode", ["inline", "worker", "sqpoll"])
def test_io_uring_into_a_missing_page(
    area: Area, started: Callable[..., Program], data: Path, mode: str
) -> None:
    """Half of the page from the file, the other half from the server, whoever touches it."""
    uring = started("uring", area.node, 20, mode, data)
    assert take_pages(area, 1) == [20]
    assert line(uring, SHORT) is None
    no_request(area, within=0.05)
    serve(area, 20)
    assert line(uring) == f"result {PAGE // 2}"
    expected = data.read_bytes() + page_bytes(20)[: PAGE // 2]
    assert area.map[20 * PAGE : 21 * PAGE] == expected


@pytest.mark.parametrize("mode", ["inline", "worker", "sqpoll"])
def test_io_uring_that_waits_can_be_killed(
    area: Area, started: Callable[..., Program], data: Path, mode: str
) -> None:
    uring = started("uring", area.node, 20, mode, data)
    take_pages(area, 1)
    killed_at_once(area, uring)


@pytest.mark.parametrize("state", ["cached", "missing"])
def test_a_registered_buffer(
    area: Area, started: Callable[..., Program], data: Path, state: str
) -> None:
    """It is pinned when it is registered, and waited for then.

    6.1 holds on to mmap_lock there, so that it could not wait, and takes no memory of files but
    that of shmem's own VMAs: it refuses, cached or not.
    """
    if state == "cached":
        serve(area, 20)
    uring = started("uring", area.node, 20, "fixed", data)
    if os.environ["UMEM_KERNEL"] == "6.1":
        assert line(uring) in ("register: Bad address", "register: Operation not supported")
        no_request(area, within=0.05)
        return
    if state == "missing":
        assert take_pages(area, 1) == [20]
        assert line(uring, SHORT) is None
        serve(area, 20)
    assert line(uring) == f"result {PAGE // 2}"
    expected = data.read_bytes() + page_bytes(20)[: PAGE // 2]
    assert area.map[20 * PAGE : 21 * PAGE] == expected


def killed_at_once(area: Area, process: Program) -> None:
    began = time.monotonic()
    process.kill()
    assert process.wait(LONG) == -signal.SIGKILL
    assert time.monotonic() - began < 5
    wait_until(lambda: not area.info().mapped, "the mapping is gone")


@pytest.fixture(scope="module")
def vhost_net() -> Iterator[None]:
    subprocess.run(["modprobe", "-a", "tun", "vhost_net"], check=True)
    wait_until(lambda: Path("/dev/vhost-net").exists(), "/dev/vhost-net is there")
    wait_until(lambda: Path("/dev/net/tun").exists(), "/dev/net/tun is there")
    yield
    subprocess.run(["modprobe", "-r", "vhost_net"], check=False)


@pytest.mark.usefixtures("vhost_net")
def test_vhost_sends_a_missing_page(area: Area, started: Callable[..., Program]) -> None:
    """Up to 6.3 its thread is a kernel thread with a borrowed mm, then one of the process."""
    vhost = started("vhost", area.node, 7)
    assert take_pages(area, 1) == [7]
    assert line(vhost, 0.5) is None  # several slices of a kernel thread's wait
    no_request(area, within=0.05)
    serve(area, 7)
    assert line(vhost) == page_bytes(7)[:60].hex()


@pytest.mark.usefixtures("vhost_net")
@pytest.mark.parametrize("server", ["there", "gone"])
def test_vhost_that_waits_can_be_killed(
    area: Area, started: Callable[..., Program], server: str
) -> None:
    """The exit of the process waits for that thread, which has to give up by itself."""
    vhost = started("vhost", area.node, 7)
    take_pages(area, 1)
    time.sleep(SHORT)
    if server == "there":
        killed_at_once(area, vhost)
        return
    area.close()
    vhost.kill()
    assert vhost.wait(LONG) == -signal.SIGKILL


# --- other system calls ---


def test_vmsplice_waits(area: Area, agent: Agent, base: int) -> None:
    """The pipe gets the page itself, so it has to be there."""
    (room,) = agent.do("alloc", PAGE)
    agent.sys("pipe", room)
    both = agent.do("peek", room)[0]
    reading, writing = both & 0xFFFFFFFF, both >> 32
    for n, word in enumerate((base + 6 * PAGE, PAGE)):
        agent.do("poke", room + 64 + 8 * n, word)
    pending = agent.start("sys", "vmsplice", writing, room + 64, 1, 0, slot=1)
    assert take_pages(area, 1) == [6]
    assert not pending.done(SHORT)
    serve(area, 6)
    assert pending.value() == PAGE
    assert agent.sys("read", reading, room + 128, 64) == 64
    assert agent.do("same", room + 128, 8, content(6)) == [8]


def test_a_debugger_gets_an_error_for_a_missing_page(
    area: Area, agent: Agent, base: int, new_agent: Callable[..., Agent]
) -> None:
    """PEEKDATA and POKEDATA cannot wait; the page comes when the debugged one touches it."""
    serve(area, 1)
    gdb = new_agent()
    (room,) = gdb.do("alloc", PAGE)
    gdb.sys("ptrace", PTRACE_SEIZE, agent.pid, 0, 0)
    gdb.sys("ptrace", PTRACE_INTERRUPT, agent.pid, 0, 0)
    gdb.do("waitpid", agent.pid)
    gdb.sys("ptrace", PTRACE_PEEKDATA, agent.pid, base + PAGE, room)
    assert gdb.do("peek", room) == [content(1)]
    for request in (PTRACE_PEEKDATA, PTRACE_POKEDATA):
        with pytest.raises(AgentError) as caught:
            gdb.sys("ptrace", request, agent.pid, base + 2 * PAGE, room)
        assert caught.value.errno == errno.EIO
    no_request(area, within=0.05)
    serve(area, 2)
    gdb.sys("ptrace", PTRACE_PEEKDATA, agent.pid, base + 2 * PAGE, room)
    assert gdb.do("peek", room) == [content(2)]
    gdb.sys("ptrace", PTRACE_POKEDATA, agent.pid, base + 2 * PAGE, 4711)
    gdb.sys("ptrace", PTRACE_DETACH, agent.pid, 0, 0)
    assert agent.word(base, 2) == 4711


def test_mincore_and_msync_fetch_nothing(area: Area, agent: Agent, base: int) -> None:
    (room,) = agent.do("alloc", PAGE)
    serve(area, 3)
    assert errno_of(agent, "mincore", base, 8 * PAGE, room) == 0
    assert errno_of(agent, "msync", base, 8 * PAGE, 4) == 0
    assert agent.do("peek", room) == [1 << 24]  # page 3 alone
    no_request(area)


def test_mlock_fetches_every_page_and_locks_none(area: Area, agent: Agent, base: int) -> None:
    with Server(area) as server:
        agent.sys("mlock", base, area.size)
    assert sorted(server.served) == list(range(NPAGES))
    status = Path(f"/proc/{agent.pid}/status").read_text()
    assert re.search(r"VmLck:\s+0 kB", status)


# --- madvise() ---

NOTHING_AT_ONCE = {
    "NORMAL": (MADV_NORMAL, 0),
    "RANDOM": (MADV_RANDOM, 0),
    "SEQUENTIAL": (MADV_SEQUENTIAL, 0),
    "WILLNEED": (MADV_WILLNEED, 0),
    "DONTNEED": (MADV_DONTNEED, 0),
    "DONTNEED_LOCKED": (MADV_DONTNEED_LOCKED, 0),
    "COLD": (MADV_COLD, 0),
    "PAGEOUT": (MADV_PAGEOUT, 0),
    "DONTFORK": (MADV_DONTFORK, 0),
    # 7.3 refuses it for a mapping with VM_DONTEXPAND, which keeps huge pages away (driver.rst).
    "DOFORK": (MADV_DOFORK, errno.EINVAL if KERNEL >= (7, 0) else 0),
    "MERGEABLE": (MADV_MERGEABLE, 0),
    "UNMERGEABLE": (MADV_UNMERGEABLE, 0),
    "HUGEPAGE": (MADV_HUGEPAGE, 0),
    "NOHUGEPAGE": (MADV_NOHUGEPAGE, 0),
    "DONTDUMP": (MADV_DONTDUMP, 0),
    "KEEPONFORK": (MADV_KEEPONFORK, 0),
    "DODUMP": (MADV_DODUMP, errno.EINVAL),
    "FREE": (MADV_FREE, errno.EINVAL),
    "WIPEONFORK": (MADV_WIPEONFORK, errno.EINVAL),
    "unknown": (77, errno.EINVAL),
}


@pytest.mark.parametrize("name", NOTHING_AT_ONCE)
def test_advice_that_fetches_and_loses_nothing(
    area: Area, agent: Agent, base: int, name: str
) -> None:
    """On cached and missing pages at once: content stays, missing stays missing and is served."""
    advice, expected = NOTHING_AT_ONCE[name]
    serve(area, 4, 2)
    agent.do("poke", base + 4 * PAGE + 8, 17)
    assert errno_of(agent, "madvise", base, 8 * PAGE, advice) == expected
    no_request(area, within=0.05)
    assert agent.do("words", base + 4 * PAGE, 3, 8) == [content(4), 17, content(4)]
    assert agent.page_is(base, 5, content(5))
    pending = agent.touch(base, 6, slot=2)
    assert take_pages(area, 1) == [6]
    serve(area, 6)
    assert pending.value() == content(6)
    assert agent.page_is(base, 6, content(6))


def test_a_child_lacks_what_is_not_to_be_forked(area: Area, agent: Agent, base: int) -> None:
    serve(area, 0, 2)
    agent.sys("madvise", base, PAGE, MADV_DONTFORK)
    with pytest.raises(AgentSignal, match="SIGSEGV"):
        agent.do("forkpeek", base)
    assert agent.do("forkpeek", base + PAGE) == [content(1)]


@pytest.mark.parametrize("state", ["cached", "missing"])
def test_soft_offline_moves_a_page(area: Area, agent: Agent, base: int, state: str) -> None:
    """The kernel takes the page frame out of use: it waits for the page, its content stays."""
    if state == "cached":
        serve(area, 9)
        agent.do("poke", base + 9 * PAGE + 8, 17)
    pending = agent.start("sys", "madvise", base + 9 * PAGE, PAGE, MADV_SOFT_OFFLINE, slot=1)
    if state == "missing":
        assert take_pages(area, 1) == [9]
        assert not pending.done(SHORT)
        serve(area, 9)
    try:
        pending.values()
    except AgentError as e:  # a page in use cannot be moved; its content stays all the same
        assert e.errno == errno.EBUSY
    second = 17 if state == "cached" else content(9)
    assert agent.do("words", base + 9 * PAGE, 3, 8) == [content(9), second, content(9)]
    assert agent.do("same", base + 9 * PAGE + 16, WORDS - 2, content(9)) == [WORDS - 2]
