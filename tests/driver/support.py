# SPDX-License-Identifier: GPL-2.0-or-later
"""What the driver's tests share: an agent process to be the consumer, and small servers.

A consumer is always another process (progs/agent.c): Python holds its interpreter lock during a
page fault, so a test that touched a missing page itself could not serve it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Self, TypeVar

from pyumem import uapi
from pyumem.area import Area

PAGE = mmap.PAGESIZE
WORDS = PAGE // 8
MASK = (1 << 64) - 1

# Not all of them are in Python's mmap module.
PROT_NONE, PROT_READ, PROT_WRITE = 0, 1, 2
RW = PROT_READ | PROT_WRITE
MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS = 1, 2, 16, 32
MADV_DONTNEED, MADV_REMOVE, MADV_HUGEPAGE = 4, 9, 14
MADV_PAGEOUT, MADV_POPULATE_READ, MADV_POPULATE_WRITE, MADV_COLLAPSE = 21, 22, 23, 25
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2

Found = TypeVar("Found")

SLOW = float(os.environ.get("UMEM_SLOW", "1"))
"""How many times as long as elsewhere things may take: more than 1 on the debug kernel."""
LONG = 20.0 * SLOW
"""Seconds that anything which has to happen may take in an emulated machine."""
SHORT = 0.15
"""Seconds after which something that would be wrong to happen is taken not to happen."""


def content(pgoff: int) -> int:
    """The word that fills page `pgoff`; never zero, and no two pages have the same."""
    return ((pgoff + 1) * 0x9E3779B97F4A7C15) & MASK


def page_bytes(pgoff: int) -> bytes:
    return content(pgoff).to_bytes(8, "little") * WORDS


def fill(area: Area, pgoff: int, count: int = 1) -> None:
    """Write the content of pages into the backing file."""
    for n in range(pgoff, pgoff + count):
        area.map[n * PAGE : (n + 1) * PAGE] = page_bytes(n)


def serve(area: Area, pgoff: int, count: int = 1) -> int:
    """Fill in place and mark; return how many pages were missing."""
    fill(area, pgoff, count)
    return area.mark([(pgoff, count)])


def write(area: Area, pgoff: int, count: int = 1) -> int:
    """As serve(), but by the calls that `umemctl serve` makes, not in place."""
    for page in range(pgoff, pgoff + count):
        area.write(page, memoryview(page_bytes(page)))
    return area.mark([(pgoff, count)])


def wait_until(what: Callable[[], Found], why: str, timeout: float = LONG) -> Found:
    """Return the first true result of `what`."""
    deadline = time.monotonic() + timeout
    while not (got := what()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:g} s: {why}")
        time.sleep(0.005)
    return got


def readable(fd: int, timeout: float = 0) -> int:
    """poll() a descriptor for POLLIN; return the events."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    events = poll.poll(timeout * 1000)
    return events[0][1] if events else 0


def take(area: Area, nr: int, timeout: float = LONG) -> list[tuple[int, int]]:
    """Get `nr` requests (pgoff, flags) in the order of their delivery; fail if they do not come."""
    got: list[tuple[int, int]] = []
    area.set_blocking(False)
    deadline = time.monotonic() + timeout
    while len(got) < nr:
        left = deadline - time.monotonic()
        if left <= 0 or not readable(area.server_fd, left):
            raise AssertionError(f"{len(got)} of {nr} requests came: {got[:20]}")
        words = area.requests()
        got.extend(zip(words[::2], words[1::2], strict=True))
    assert len(got) == nr, f"more requests than the {nr} expected: {got[:20]}"
    return got


def take_pages(area: Area, nr: int, timeout: float = LONG) -> list[int]:
    return [pgoff for pgoff, _ in take(area, nr, timeout)]


def no_request(area: Area, within: float = SHORT) -> None:
    """Fail if a request is delivered.  A POLLIN alone is no request, it may be a false alarm."""
    area.set_blocking(False)
    deadline = time.monotonic() + within
    while (left := deadline - time.monotonic()) > 0:
        if readable(area.server_fd, left):
            words = list(area.requests())
            assert not words, f"unexpected request: {words}"


class Server(contextlib.AbstractContextManager["Server"]):
    """A thread that fills and marks whatever is asked for, until the end of the with block."""

    def __init__(
        self,
        area: Area,
        answer: Callable[[Area, int], bool | None] | None = None,
        *,
        run: int = 0,
    ) -> None:
        """run: mark so many pages around what is asked for, if not only the granule.  What answer()
        returns False for is not marked.
        """
        self.area = area
        self.served: list[int] = []
        self._run_pages = run or area.granule_size // PAGE
        self._answer = answer or (lambda area, pgoff: fill(area, pgoff))
        self._error: BaseException | None = None
        self._stop = os.eventfd(0)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._stop, select.POLLIN)
        poll.register(self.area.server_fd, select.POLLIN)
        try:
            while self._stop not in [fd for fd, _ in poll.poll()]:
                pages = list(self.area.requests()[::2])
                marked = [p for p in pages if self._answer(self.area, p) is not False]
                run = self._run_pages
                self.area.mark((pgoff - pgoff % run, run) for pgoff in marked)
                self.served += marked
        except BaseException as e:
            self._error = e

    def __enter__(self) -> Self:
        self.area.set_blocking(False)
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        os.eventfd_write(self._stop, 1)
        self._thread.join(LONG)
        assert not self._thread.is_alive()
        os.close(self._stop)
        if self._error is not None:
            raise self._error


class AgentError(OSError):
    """A system call of the agent failed; errno tells why."""


class AgentSignal(Exception):
    """A command of the agent ended by SIGBUS or SIGSEGV."""

    def __init__(self, signum: int) -> None:
        self.signum = signal.Signals(signum)
        super().__init__(self.signum.name)


class Pending:
    """A command that was given to the agent."""

    def __init__(self, agent: Agent, seq: int, text: str) -> None:
        self._agent, self._seq, self._text = agent, seq, text

    def done(self, within: float = 0) -> bool:
        """Is the answer there, at the latest after so many seconds?"""
        deadline = time.monotonic() + within
        while self._seq not in self._agent.answers:
            if not self._agent.receive(deadline - time.monotonic()):
                return False
        return True

    def values(self, timeout: float = LONG) -> list[int]:
        """Return the values of the answer; raises AgentError or AgentSignal."""
        if not self.done(timeout):
            raise AssertionError(f"no answer within {timeout:g} s: {self._text}")
        kind, *rest = self._agent.answers.pop(self._seq)
        if kind == "err":
            raise AgentError(int(rest[0]), f"{os.strerror(int(rest[0]))}: {self._text}")
        if kind == "sig":
            raise AgentSignal(int(rest[0]))
        return [int(word) for word in rest]

    def value(self, timeout: float = LONG) -> int:
        return self.values(timeout)[0]


class Agent:
    """A consumer (or any other process of a test) that is told what to do, see progs/agent.c.

    Slots are its threads: what sleeps in one does not keep another from working.
    """

    def __init__(
        self, program: Path, *, pass_fds: Iterable[int] = (), uid: int | None = None
    ) -> None:
        self._process = subprocess.Popen(
            [program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=tuple(pass_fds),
            user=uid,
            group=uid,
            extra_groups=None if uid is None else [],
            bufsize=0,
        )
        self.pid = self._process.pid
        self.answers: dict[int, list[str]] = {}
        self._seq = 0
        self._tids: dict[int, int] = {}
        self._rest = b""

    # --- talking ---

    def start(self, command: str, *args: int | str, slot: int = 0) -> Pending:
        """Give a command to a slot and do not wait for it."""
        self._seq += 1
        text = " ".join([command, *map(str, args)])
        assert self._process.stdin is not None
        self._process.stdin.write(f"{self._seq} {slot} {text}\n".encode())
        return Pending(self, self._seq, text)

    def receive(self, timeout: float) -> bool:
        """Take in what the agent says; False when nothing came in so many seconds."""
        assert self._process.stdout is not None
        out = self._process.stdout
        if not select.select([out], [], [], max(timeout, 0))[0]:
            return False
        data = os.read(out.fileno(), 1 << 16)
        if not data:
            raise AssertionError(f"the agent is gone, status {self._process.wait(LONG)}")
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            seq, *answer = line.decode().split()
            self.answers[int(seq)] = answer
        return True

    def do(self, command: str, *args: int | str, slot: int = 0) -> list[int]:
        return self.start(command, *args, slot=slot).values()

    def sys(self, name: str, *args: int, slot: int = 0) -> int:
        """Do a system call; raises AgentError."""
        return self.do("sys", name, *args, slot=slot)[0]

    # --- common system calls ---

    def ioctl(self, fd: int, number: int, arg: bytes) -> bytes:
        """Do an ioctl whose argument is a structure; return what became of it."""
        (where,) = self.do("alloc", PAGE)
        words = memoryview(arg + bytes(-len(arg) % 8)).cast("Q")
        for n, word in enumerate(words):
            self.do("poke", where + 8 * n, word)
        self.sys("ioctl", fd, number, where)
        got = self.do("words", where, len(words), 8)
        return b"".join(word.to_bytes(8, "little") for word in got)[: len(arg)]

    def open(self, path: str, flags: int = os.O_RDWR) -> int:
        return self.sys("open", self.do("str", path)[0], flags)

    def mmap(
        self,
        fd: int,
        npages: int,
        *,
        pgoff: int = 0,
        prot: int = RW,
        flags: int = MAP_SHARED,
        addr: int = 0,
    ) -> int:
        return self.sys("mmap", addr, npages * PAGE, prot, flags, fd, pgoff * PAGE)

    def map_node(self, area: Area, *, addr: int = 0) -> int:
        """Open and map the whole node, like QEMU does; the descriptor is closed again."""
        fd = self.open(area.node)
        base = self.mmap(fd, area.npages, addr=addr, flags=MAP_SHARED | (addr and MAP_FIXED))
        self.sys("close", fd)
        return base

    def reserve(self, npages: int, align: int = PAGE) -> int:
        """Return an address with so much free room behind it, aligned."""
        size = npages * PAGE + align
        base = self.sys("mmap", 0, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        return (base + align - 1) & ~(align - 1)

    # --- memory ---

    def touch(self, base: int, pgoff: int, slot: int) -> Pending:
        """Start to read the first word of a page in a slot."""
        return self.start("peek", base + pgoff * PAGE, slot=slot)

    def word(self, base: int, pgoff: int) -> int:
        return self.do("peek", base + pgoff * PAGE)[0]

    def page_is(self, base: int, pgoff: int, word: int) -> bool:
        """Is the whole page filled with this word?"""
        return self.do("same", base + pgoff * PAGE, WORDS, word)[0] == WORDS

    def touch_all(self, base: int, pages: Iterable[int]) -> list[Pending]:
        """Touch missing pages from slots 1, 2, ...: the next when the one before sleeps."""
        pending = []
        for slot, page in enumerate(pages, 1):
            tid = self.tid(slot)
            pending.append(self.touch(base, page, slot))
            self.wait_asleep(tid)
        return pending

    # --- looking at it from outside ---

    def tid(self, slot: int) -> int:
        """The thread of a slot; asked for the first time, the slot must be idle."""
        if slot not in self._tids:
            self._tids[slot] = self.sys("gettid", slot=slot)
        return self._tids[slot]

    def stat(self, tid: int, field: int) -> str:
        """Field of /proc/PID/stat as proc(5) numbers them, for fields behind the name."""
        text = Path(f"/proc/{self.pid}/task/{tid}/stat").read_text()
        return text.rpartition(") ")[2].split()[field - 3]

    def wait_asleep(self, tid: int) -> None:
        """Wait until the thread sleeps in a fault or in a system call, but not in its idle loop.

        The idle loop waits on a futex, which /proc/PID/task/TID/syscall tells from all else.
        """

        def asleep() -> bool:
            state = self.stat(tid, 3)
            call = Path(f"/proc/{self.pid}/task/{tid}/syscall").read_text()
            return state in "SD" and not call.startswith(("running", "202 "))

        wait_until(asleep, f"thread {tid} sleeps")

    def switches(self, tid: int) -> int:
        """How often the thread went to sleep so far."""
        for line in Path(f"/proc/{self.pid}/task/{tid}/status").read_text().splitlines():
            if line.startswith("voluntary_ctxt_switches"):
                return int(line.split()[1])
        raise AssertionError("no voluntary_ctxt_switches")

    def smaps(self, base: int, key: str) -> list[str]:
        """Words of a line of /proc/PID/smaps, of the mapping at this address."""
        found = False
        for line in Path(f"/proc/{self.pid}/smaps").read_text().splitlines():
            head, *words = line.split()
            if "-" in head:
                found = int(head.split("-")[0], 16) == base
            elif found and head == f"{key}:":
                return words
        raise AssertionError("no such mapping")

    # --- its end ---

    def kill(self, signum: int = signal.SIGKILL) -> None:
        self._process.send_signal(signum)

    def hang_up(self) -> None:
        """Close its standard input: it exits, whatever its threads are doing."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def wait(self, timeout: float = LONG) -> int:
        """Wait for the process to end; return its status as subprocess has it."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the agent does not end: {self.where()}") from None

    def where(self) -> str:
        """What each of its threads does, for a message."""
        return stacks(self.pid)

    def close(self) -> None:
        self.kill()
        self.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()


@contextlib.contextmanager
def lowered_nofile(room: int) -> Iterator[None]:
    """Let this process open `room` more descriptors and no more."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = []
    # The limit is on the number, not on the count: fill the gaps below the highest first.
    highest = max(int(p.name) for p in Path("/proc/self/fd").iterdir())
    while True:
        fd = os.open("/dev/null", os.O_RDONLY)
        taken.append(fd)
        if fd > highest:
            break
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken[-1] + 1 + room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in taken:
            os.close(fd)


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@contextlib.contextmanager
def control() -> Iterator[int]:
    fd = uapi.open_control()
    try:
        yield fd
    finally:
        os.close(fd)


def areas() -> list[uapi.AreaInfo]:
    with control() as fd:
        return uapi.list_areas(fd)


def stacks(pid: int) -> str:
    """What each thread of a process does, for a message."""
    found = []
    for task in sorted(Path(f"/proc/{pid}/task").glob("*")):
        with contextlib.suppress(OSError):
            found.append(f"{task.name}: {(task / 'stack').read_text()}")
    return "\n".join(found)


def kill_left() -> str:
    """Kill every other process that has an area's node open; return who they were and what they
    did.

    Descriptors are looked at, not mappings: those of a stuck process may be locked.
    """
    left: list[int] = []
    for fd in Path("/proc").glob("[0-9]*/fd/*"):
        pid = int(fd.parts[2])
        with contextlib.suppress(OSError):
            if str(fd.readlink()).startswith("/dev/umem") and pid not in (os.getpid(), *left):
                left.append(pid)
    told = []
    for pid in left:
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text()
            told.append(f"{pid}: {status}\n{stacks(pid)}")
            os.kill(pid, signal.SIGKILL)
    return "\n".join(told)


def module_refs() -> int:
    return int(Path("/sys/module/umem/refcnt").read_text())
