# SPDX-License-Identifier: GPL-2.0-or-later
"""Servers that die, hang or are replaced: requests outlive them, and the old one is fenced."""

from __future__ import annotations

import errno
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from pyumem import uapi
from pyumem.area import Area
from pyumem.errors import DriverError

from .support import (
    LONG,
    PAGE,
    SHORT,
    Agent,
    AgentError,
    areas,
    content,
    control,
    fill,
    no_request,
    readable,
    serve,
    take,
    take_pages,
    wait_until,
)


def waiters(agent: Agent, area: Area, pages: list[int]) -> list[Callable[[], int]]:
    base = agent.map_node(area)
    return [p.value for p in agent.touch_all(base, pages)]


def test_requests_outlive_their_server(area: Area, agent: Agent) -> None:
    """Some were delivered and not answered, some not delivered: the next server gets them all."""
    pages = [9, 30, 2, 41, 5]
    answers = waiters(agent, area, pages)
    assert len(set(take_pages(area, 5))) == 5
    serve(area, 30)
    assert answers[1]() == content(30)
    area.close()
    (known,) = areas()
    assert (known.served, known.server_pid, known.nr_cached) == (False, 0, 1)
    time.sleep(SHORT)  # nobody is hurt meanwhile
    agent.receive(0)
    assert not agent.answers
    with Area.reattach(known.id) as successor:
        assert successor.info().served
        assert successor.info().server_pid == os.getpid()
        assert (successor.name, successor.size) == (area.name, area.size)
        left = {9, 2, 41, 5}
        assert set(take_pages(successor, 4)) == left
        no_request(successor)
        for page in left:
            serve(successor, page)
        assert [answer() for n, answer in enumerate(answers) if n != 1] == [
            content(page) for page in pages if page != 30
        ]


def test_what_the_dead_server_had_filled_is_kept(area: Area, agent: Agent) -> None:
    fill(area, 3)
    (answer,) = waiters(agent, area, [3])
    area.close()
    with Area.reattach(areas()[0].id) as successor:
        assert take_pages(successor, 1) == [3]
        with successor.view(3, 1) as view:
            assert view.cast("Q")[0] == content(3)
        successor.mark([(3, 1)])
        assert answer() == content(3)


SERVER = """
import os, sys
from pyumem.area import Area
area = Area.create("doomed", 64 * 4096)
print(area.id, flush=True)
while True:
    words = area.requests()
    print(*words[::2], flush=True)
"""


def test_server_killed_with_waiters(agent: Agent) -> None:
    """A real process dies by SIGKILL, in a blocking call, with requests in its hands."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert server.stdout is not None
    area_id = int(server.stdout.readline())
    fd = agent.open(f"/dev/umem{area_id}")
    base = agent.mmap(fd, 64)
    pending = agent.touch_all(base, range(1, 17))
    seen: set[int] = set()
    while len(seen) < 16:
        seen.update(map(int, server.stdout.readline().split()))
    server.kill()
    server.communicate()
    wait_until(lambda: not areas()[0].served, "the area has no server")
    more = []
    for page in range(20, 24):
        tid = agent.tid(page)
        more.append(agent.touch(base, page, slot=page))
        agent.wait_asleep(tid)
    with Area.reattach(area_id) as successor:
        assert set(take_pages(successor, 20)) == set(range(1, 17)) | set(range(20, 24))
        serve(successor, 0, 64)
        assert [p.value() for p in pending] == [content(n) for n in range(1, 17)]
        assert [p.value() for p in more] == [content(n) for n in range(20, 24)]


def test_an_area_with_a_server_is_taken_by_force_only(area: Area) -> None:
    with pytest.raises(DriverError) as caught:
        Area.reattach(area.id)
    assert caught.value.errno == errno.EBUSY
    with Area.reattach(area.id, force=True) as successor:
        assert successor.info().served


def expect_fenced(area: Area) -> None:
    for call in (
        lambda: os.read(area.server_fd, 8),
        lambda: os.write(area.server_fd, bytes(8)),
        area.requests,
        area.info,
        lambda: area.mark([(0, 1)]),
    ):
        try:
            call()
        except (OSError, DriverError) as e:
            assert e.errno == errno.ENODEV
        else:
            raise AssertionError("a fenced server did something")
    assert readable(area.server_fd) == select.POLLERR | select.POLLHUP


def test_a_fenced_server_can_do_nothing(area: Area, agent: Agent) -> None:
    (answer,) = waiters(agent, area, [4])
    take(area, 1)
    with Area.reattach(area.id, force=True) as successor:
        area.set_blocking(False)
        expect_fenced(area)
        assert successor.info().nr_cached == 0
        assert take_pages(successor, 1) == [4]
        serve(successor, 4)
        assert answer() == content(4)
        # Its end does not take the area from its successor.
        area.close()
        assert successor.info().served
        assert successor.mark([(5, 1)]) == 1


@pytest.mark.parametrize("how", ["read", "get"])
def test_fencing_ends_a_blocked_call(area: Area, how: str) -> None:
    failed: list[int] = []

    def sleep() -> None:
        try:
            if how == "read":
                os.read(area.server_fd, 8)
            else:
                area.requests()
        except (OSError, DriverError) as e:
            failed.append(e.errno or 0)

    area.set_blocking(True)
    thread = threading.Thread(target=sleep, daemon=True)
    thread.start()
    time.sleep(SHORT)
    assert thread.is_alive()
    with Area.reattach(area.id, force=True):
        thread.join(LONG)
        assert failed == [errno.ENODEV]


def test_fencing_ends_a_blocked_poll(area: Area) -> None:
    events: list[int] = []
    thread = threading.Thread(
        target=lambda: events.append(readable(area.server_fd, LONG)), daemon=True
    )
    thread.start()
    time.sleep(SHORT)
    with Area.reattach(area.id, force=True):
        thread.join(LONG)
        assert events == [select.POLLERR | select.POLLHUP]


def test_a_chain_of_servers(area: Area, agent: Agent) -> None:
    """Each fences the one before; a page that is wanted is never lost on the way."""
    (answer,) = waiters(agent, area, [8])
    chain = [area]
    try:
        for _ in range(10):
            assert take_pages(chain[-1], 1) == [8]
            chain.append(Area.reattach(area.id, force=True))
        serve(chain[-1], 8)
        assert answer() == content(8)
        for fenced in chain[:-1]:
            fenced.set_blocking(False)
            expect_fenced(fenced)
    finally:
        for server in chain[1:]:
            server.close()


def test_open_requests_come_back_whatever_the_old_server_is_doing(area: Area, agent: Agent) -> None:
    """The old server keeps taking requests while it is fenced: none may get lost in its hands."""
    pages = list(range(1, 33))
    answers = waiters(agent, area, pages)
    wait_until(lambda: readable(area.server_fd), "requests")
    server, olds = area, []
    try:
        for _ in range(60):
            stop = threading.Event()

            def grab(old: Area = server, stop: threading.Event = stop) -> None:
                buffer = uapi.RequestBuffer(3)
                while not stop.is_set():
                    try:
                        buffer.get(old.server_fd)
                    except DriverError:
                        return

            server.set_blocking(False)
            thief = threading.Thread(target=grab, daemon=True)
            thief.start()
            successor = Area.reattach(area.id, force=True)
            olds.append(server)
            server = successor
            assert sorted(take_pages(server, len(pages))) == pages
            # Delivered again for the next round.
            stop.set()
            thief.join(LONG)
        serve(server, 0, 64)
        assert [answer() for answer in answers] == [content(page) for page in pages]
    finally:
        for old in olds[1:]:
            old.close()
        server.close()


def reattach(agent: Agent, control: int, area_id: int, flags: int = 0) -> None:
    """Re-attach in the agent; it keeps the descriptors.  Raises AgentError."""
    arg = uapi.REATTACH.pack(id=area_id, flags=flags)
    agent.ioctl(control, uapi.UMEM_DEV_REATTACH, bytes(arg))


def test_only_the_creator_or_an_administrator_may_take_over(
    agent: Agent, new_agent: Callable[..., Agent]
) -> None:
    """An area of root and one of a user; the user may open /dev/umem, who gave it does not matter.

    The descriptor of /dev/umem is inherited: what counts is who calls.
    """
    with control() as fd:
        user, other = (new_agent(uid=uid, pass_fds=[fd]) for uid in (4321, 1234))
        administrator = new_agent(pass_fds=[fd])
        with Area.create("of.root", PAGE) as roots:
            for flags in (0, uapi.UMEM_REATTACH_FORCE):
                with pytest.raises(AgentError) as caught:
                    reattach(user, fd, roots.id, flags)
                assert caught.value.errno == errno.EPERM
            assert roots.info().server_pid == os.getpid()  # not fenced by the attempt

        arg = uapi.CREATE.pack(size=PAGE, name=b"of.user")
        user.ioctl(fd, uapi.UMEM_DEV_CREATE_UMEM, bytes(arg))
        (known,) = areas()
        assert (known.owner_uid, known.server_pid) == (4321, user.pid)
        node = agent.open(f"/dev/umem{known.id}")  # root's; it keeps the area alive
        with pytest.raises(AgentError) as caught:
            reattach(other, fd, known.id, uapi.UMEM_REATTACH_FORCE)
        assert caught.value.errno == errno.EPERM
        user.kill()
        user.wait()
        wait_until(lambda: not areas()[0].served, "the area has no server")
        heir = new_agent(uid=4321, pass_fds=[fd])
        for who, allowed in ((other, False), (heir, True)):
            if allowed:
                reattach(who, fd, known.id)
            else:
                with pytest.raises(AgentError) as caught:
                    reattach(who, fd, known.id)
                assert caught.value.errno == errno.EPERM
        assert areas()[0].server_pid == heir.pid
        reattach(administrator, fd, known.id, uapi.UMEM_REATTACH_FORCE)
        assert areas()[0].server_pid == administrator.pid
        agent.sys("close", node)
