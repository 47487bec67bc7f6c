# SPDX-License-Identifier: GPL-2.0-or-later
"""The control node: create, list, re-attach, and everything that they refuse."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import string
from collections.abc import Callable
from pathlib import Path

import pytest

from pyumem import uapi
from pyumem.area import Area
from pyumem.errors import DriverError

from .support import (
    PAGE,
    Agent,
    areas,
    control,
    lowered_nofile,
    no_request,
    open_fds,
    take_pages,
)

UINT64_MAX = (1 << 64) - 1
MEMORY = os.sysconf("SC_PHYS_PAGES") * PAGE


def refused(number: int, arg: bytearray | int, expected: int) -> None:
    """The ioctl on /dev/umem fails with this errno and leaves neither descriptor nor area."""
    before, fds = areas(), open_fds()
    with control() as fd, pytest.raises(OSError) as caught:
        fcntl.ioctl(fd, number, arg)
    assert caught.value.errno == expected
    assert areas() == before
    assert open_fds() == fds


def test_create_gives_what_the_header_says() -> None:
    with Area.create("vm1.ram0", 10 * PAGE - 1) as area:
        assert area.size == 10 * PAGE
        assert area.granule_size == PAGE
        known = area.info()
        assert known == uapi.AreaInfo(
            id=area.id,
            name="vm1.ram0",
            size=10 * PAGE,
            granule_size=PAGE,
            nr_cached=0,
            nr_delivered=0,
            flags=uapi.UMEM_INFO_SERVED | uapi.UMEM_INFO_NODE,
            owner_uid=os.getuid(),
            server_pid=os.getpid(),
            loss_timeout_ms=0,
        )
        assert areas() == [known]
        for fd in (area.server_fd, area.shmem_fd):
            assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
            assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
        assert os.fstat(area.shmem_fd).st_size == area.size


def test_backing_file_can_be_read_and_written_at_offsets(area: Area) -> None:
    """Trap 12: files of shmem_file_setup() lack the modes for it."""
    assert os.pwrite(area.shmem_fd, b"text", 5 * PAGE) == 4
    assert os.pread(area.shmem_fd, 4, 5 * PAGE) == b"text"
    assert os.lseek(area.shmem_fd, 0, os.SEEK_DATA) == 5 * PAGE  # what was filled, by extents
    assert area.map[5 * PAGE : 5 * PAGE + 4] == b"text"


def test_node_comes_and_goes_with_owner_and_mode() -> None:
    area = Area.create("a", PAGE)
    node = Path(area.node)
    try:
        status = node.stat()
        assert stat.S_ISCHR(status.st_mode)
        assert stat.S_IMODE(status.st_mode) == 0o660
        assert (status.st_uid, status.st_gid) == (os.getuid(), os.getgid())
    finally:
        area.close()
    assert not node.exists()


def test_node_belongs_to_the_one_who_created_the_area(new_agent: Callable[..., Agent]) -> None:
    """A user who may open /dev/umem gets a node of his own."""
    with control() as fd:
        user = new_agent(uid=4321, pass_fds=[fd])
        arg = uapi.CREATE.pack(size=PAGE, name=b"of.a.user")
        got = uapi.CREATE.ints(bytearray(user.ioctl(fd, uapi.UMEM_DEV_CREATE_UMEM, bytes(arg))))
        status = Path(f"/dev/umem{got['id']}").stat()
        assert (status.st_uid, status.st_gid) == (4321, 4321)
        assert stat.S_IMODE(status.st_mode) == 0o660
        assert areas()[0].owner_uid == 4321
        user.open(f"/dev/umem{got['id']}")
        with pytest.raises(OSError) as caught:
            new_agent(uid=1234).open(f"/dev/umem{got['id']}")
        assert caught.value.errno == errno.EACCES


@pytest.mark.parametrize(
    "name",
    [
        "",
        "a/b",
        "a b",
        "..\n",
        "a\tb",
        "n\u00e4me",
        "a%b",
        "x" * uapi.NAME_MAX,  # no room for the NUL
        "tail\x00",
    ],
)
def test_names_that_are_refused(name: str) -> None:
    if name == "tail\x00":
        # What follows the NUL is no part of the name: this one is fine.
        with Area.create(name, PAGE) as area:
            assert area.info().name == "tail"
        return
    refused(
        uapi.UMEM_DEV_CREATE_UMEM, uapi.CREATE.pack(size=PAGE, name=name.encode()), errno.EINVAL
    )


def test_names_that_are_allowed() -> None:
    legal = string.ascii_letters + string.digits + "._:+-"
    longest = (legal * 2)[: uapi.NAME_MAX - 1]
    for name in (*legal, longest, "..."):
        if name == ".":
            continue  # it would be a directory of the file system
        with Area.create(name, PAGE) as area:
            assert area.info().name == name


def test_names_are_unique_among_those_alive(area: Area) -> None:
    with pytest.raises(DriverError) as caught:
        Area.create(area.name, PAGE)
    assert caught.value.errno == errno.EEXIST
    assert area.name in str(caught.value)
    name = area.name
    area.close()
    Area.create(name, PAGE).close()  # free again, and at once


@pytest.mark.parametrize(
    "members",
    [
        {"size": 0},
        {"size": UINT64_MAX},  # rounding it up would wrap to zero
        {"size": UINT64_MAX - PAGE + 2},
        {"size": 1 << 63},
        {"size": 4 * MEMORY + PAGE},  # the module's default limit
        {"flags": 2},
        {"flags": 1 << 31},
        {"flags": uapi.UMEM_CREATE_HUGE},  # needs a granule of 2 MiB
        {"flags": uapi.UMEM_CREATE_HUGE, "granule_size": 16 * PAGE},
        {"granule_size": 1},
        {"granule_size": PAGE - 1},
        {"granule_size": 3 * PAGE},
        {"granule_size": 2 * uapi.GRANULE_MAX},
        {"granule_size": 1 << 31},
        {"name": b"."},
        {"name": b".."},
    ],
    ids=str,
)
def test_create_refuses(members: dict[str, int | bytes]) -> None:
    values: dict[str, int | bytes] = {"size": PAGE, "name": b"refused", **members}
    arg = uapi.CREATE.pack(**values)
    refused(uapi.UMEM_DEV_CREATE_UMEM, arg, errno.EINVAL)


def test_create_takes_the_page_as_granule() -> None:
    with control() as fd:
        made = uapi.create(fd, "page", PAGE, granule_size=PAGE)
        assert made.granule_size == PAGE
        os.close(made.server_fd)
        os.close(made.shmem_fd)


def test_an_area_may_be_larger_than_the_memory(agent: Agent) -> None:
    """Only what is filled takes memory."""
    with Area.create("huge", 3 * MEMORY) as area:
        last = area.npages - 1
        assert os.fstat(area.shmem_fd).st_blocks == 0
        base = agent.map_node(area)
        pending = agent.touch(base, last, slot=1)
        assert take_pages(area, 1) == [last]
        area.mark([(0, area.npages)])
        assert area.info().complete
        assert pending.value() == 0


@pytest.mark.parametrize(
    ("number", "layout"),
    [
        (uapi.UMEM_DEV_CREATE_UMEM, uapi.CREATE),
        (uapi.UMEM_DEV_LIST, uapi.LIST),
        (uapi.UMEM_DEV_REATTACH, uapi.REATTACH),
    ],
    ids=["create", "list", "reattach"],
)
def test_reserved_bytes_must_be_zero(area: Area, number: int, layout: uapi.Layout) -> None:
    """Each single one of them."""
    values: dict[str, int | bytes] = {
        "umem_create": {"size": PAGE, "name": b"reserved"},
        "umem_list": {"nr": 0},
        "umem_reattach": {"id": area.id, "flags": uapi.UMEM_REATTACH_FORCE},
    }[layout.tag]  # type: ignore[assignment]
    start, size = next((at, size) for name, at, size in layout.offsets() if name == "reserved")
    for n in (start, start + size // 2, start + size - 1):
        arg = layout.pack(**values)
        arg[n] = 1
        refused(number, arg, errno.EINVAL)


def test_reattach_refuses_unknown_flags_and_ids(area: Area) -> None:
    for flags in (2, 3, 1 << 31):
        arg = uapi.REATTACH.pack(id=area.id, flags=flags)
        refused(uapi.UMEM_DEV_REATTACH, arg, errno.EINVAL)
    for bad in (area.id + 1, 0xFFFFFFFF):
        refused(uapi.UMEM_DEV_REATTACH, uapi.REATTACH.pack(id=bad), errno.ENOENT)


@pytest.mark.parametrize(
    "number",
    [
        uapi.UMEM_INIT,
        uapi.UMEM_DEV_CREATE_UMEM,
        uapi.UMEM_DEV_LIST,
        uapi.UMEM_DEV_REATTACH,
    ],
)
def test_bad_argument_address(agent: Agent, number: int) -> None:
    """An unmapped argument, and one that can be read but not written (found out last)."""
    fd = agent.open(uapi.DEVICE)
    for address in (0, 8, 1 << 46):
        with pytest.raises(OSError) as caught:
            agent.sys("ioctl", fd, number, address)
        assert caught.value.errno == errno.EFAULT
    layout = {
        uapi.UMEM_INIT: (uapi.INIT, {"size": PAGE}),
        uapi.UMEM_DEV_CREATE_UMEM: (uapi.CREATE, {"size": PAGE, "name": b"fault"}),
        uapi.UMEM_DEV_LIST: (uapi.LIST, {}),
    }
    if number in layout:
        kind, values = layout[number]
        arg = kind.pack(**values)  # type: ignore[arg-type]
        arg += bytes(-len(arg) % 8)
        page = agent.sys("mmap", 0, PAGE, 3, 0x22, -1, 0)
        for n in range(0, len(arg), 8):
            agent.do("poke", page + n, int.from_bytes(arg[n : n + 8], "little"))
        agent.sys("mprotect", page, PAGE, 1)
        with pytest.raises(OSError) as caught:
            agent.sys("ioctl", fd, number, page)
        assert caught.value.errno == errno.EFAULT
        # The negative control: the same bytes are fine where they can be written.
        agent.sys("mprotect", page, PAGE, 3)
        agent.sys("ioctl", fd, number, page)
    assert all(known.server_pid == agent.pid for known in areas())
    assert len(areas()) == (number in (uapi.UMEM_INIT, uapi.UMEM_DEV_CREATE_UMEM))


def test_list_with_a_bad_array(area: Area) -> None:
    refused(uapi.UMEM_DEV_LIST, uapi.LIST.pack(infos=8, nr=1), errno.EFAULT)
    # Nothing is written where there is no room: only counted.
    with control() as fd:
        arg = uapi.LIST.pack(infos=8, nr=0)
        fcntl.ioctl(fd, uapi.UMEM_DEV_LIST, arg)
        got = uapi.LIST.ints(arg)
        assert (got["nr"], got["total"]) == (0, 1)
        arg = uapi.LIST.pack(infos=8, nr=5, first_id=area.id + 1)
        fcntl.ioctl(fd, uapi.UMEM_DEV_LIST, arg)
        assert uapi.LIST.ints(arg)["total"] == 0


def test_list_in_pieces(new_area: Callable[[int], Area]) -> None:
    made = [new_area(n + 1) for n in range(7)]
    ids = sorted(area.id for area in made)
    with control() as fd:
        for room in (1, 2, 3, 7, 100):
            assert [known.id for known in uapi.list_areas(fd, room=room)] == ids
    made[3].close()
    assert [known.id for known in areas()] == [i for i in ids if i != made[3].id]


@pytest.mark.parametrize("room", [0, 1])
def test_no_descriptor_left_leaks_nothing(area: Area, room: int) -> None:
    """Create and re-attach need two descriptors each, UMEM_INIT one."""
    fds = open_fds()
    with control() as fd:
        with lowered_nofile(room):
            for call in (
                lambda: uapi.create(fd, "emfile", PAGE),
                lambda: uapi.reattach(fd, area.id, True),
                lambda: uapi.init(fd, PAGE),
            )[: 3 - room]:
                with pytest.raises(DriverError) as caught:
                    call()
                assert caught.value.errno == errno.EMFILE
        assert [known.name for known in areas()] == [area.name]
        assert area.info().server_pid == os.getpid()  # not fenced by the attempt
        # The file is as good as before: the descriptor was all that was missing.
        os.close(uapi.init(fd, PAGE).shmem_fd)
    assert open_fds() == fds


@pytest.mark.parametrize("number", [0x1E00, uapi.UMEM_INIT + 1, uapi.UMEM_GET_INFO + 1, 0x5401])
def test_unknown_ioctls(area: Area, number: int) -> None:
    refused(number, bytearray(256), errno.ENOTTY)
    with pytest.raises(OSError) as caught:
        fcntl.ioctl(area.server_fd, number, bytearray(256))
    assert caught.value.errno == errno.ENOTTY


def test_too_many_areas(new_area: Callable[[int], Area]) -> None:
    """ENOSPC at the module's limit, for both kinds; what was closed makes room again."""
    limit = Path("/sys/module/umem/parameters/max_areas")
    before = limit.read_text()
    made = [new_area(1), new_area(1)]
    limit.write_text("3")
    try:
        made.append(new_area(1))
        with control() as fd:
            for call in (lambda: uapi.create(fd, "one", PAGE), lambda: uapi.init(fd, PAGE)):
                with pytest.raises(DriverError) as caught:
                    call()
                assert caught.value.errno == errno.ENOSPC
            assert len(areas()) == 3
            made[0].close()
            os.close(uapi.init(fd, PAGE).shmem_fd)
    finally:
        limit.write_text(before)


def test_the_node_is_the_consumers_end_only(area: Area) -> None:
    """Who may map an area may not serve it."""
    fd = os.open(area.node, os.O_RDWR)
    try:
        for call in (
            lambda: os.read(fd, 8),
            lambda: os.write(fd, bytes(8)),
            lambda: uapi.info(fd),
            lambda: fcntl.ioctl(fd, uapi.UMEM_MARK_PAGE_CACHED, uapi.MARK_CACHED.pack()),
            lambda: fcntl.ioctl(fd, uapi.UMEM_DEV_CREATE_UMEM, uapi.CREATE.pack()),
            lambda: os.ftruncate(fd, PAGE),
        ):
            with pytest.raises((OSError, DriverError)):
                call()
        assert os.lseek(fd, 0, os.SEEK_END) == area.size
    finally:
        os.close(fd)
    assert area.info().nr_cached == 0
    no_request(area, within=0.05)


def test_the_servers_end_cannot_be_mapped(area: Area, new_agent: Callable[..., Agent]) -> None:
    agent = new_agent(pass_fds=[area.server_fd])
    with pytest.raises(OSError) as caught:
        agent.mmap(area.server_fd, 1)
    assert caught.value.errno == errno.ENODEV


def test_backing_file_keeps_its_size(area: Area) -> None:
    os.ftruncate(area.shmem_fd, area.size)
    for size in (0, area.size - PAGE, area.size - 1, area.size + 1, area.size + PAGE):
        with pytest.raises(OSError) as caught:
            os.ftruncate(area.shmem_fd, size)
        assert caught.value.errno == errno.EPERM
    with pytest.raises(OSError):
        os.pwrite(area.shmem_fd, b"x", area.size)
    assert os.fstat(area.shmem_fd).st_size == area.size


def test_area_lives_as_long_as_a_node_is_open_or_mapped(area: Area, agent: Agent) -> None:
    fd = agent.open(area.node)
    base = agent.mmap(fd, area.npages)
    area.mark([(0, 1)])
    area.close()
    (known,) = areas()
    assert (known.served, known.mapped, known.server_pid) == (False, True, 0)
    agent.sys("close", fd)
    assert areas()[0].mapped
    assert agent.word(base, 0) == 0  # what is cached needs no server
    agent.sys("munmap", base, area.size)
    assert areas() == []


def test_area_lives_while_only_its_node_is_open(area: Area, agent: Agent) -> None:
    fd = agent.open(area.node)
    area.close()
    (known,) = areas()
    assert (known.served, known.mapped) == (False, False)
    agent.sys("close", fd)
    assert areas() == []


def test_node_can_be_opened_by_nobody_else(area: Area, new_agent: Callable[..., Agent]) -> None:
    stranger = new_agent(uid=4321)
    with pytest.raises(OSError) as caught:
        stranger.open(area.node)
    assert caught.value.errno == errno.EACCES
    with pytest.raises(OSError) as caught:
        stranger.open(uapi.DEVICE)
    assert caught.value.errno == errno.EACCES
