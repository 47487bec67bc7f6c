# SPDX-License-Identifier: GPL-2.0-or-later
"""An area as a regular file, for those who call fallocate() on what they map."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pyumem import areafs, uapi
from pyumem.area import Area

from .support import (
    PAGE,
    SHORT,
    Agent,
    AgentError,
    content,
    module_refs,
    serve,
    take,
    take_pages,
)

PUNCH, KEEP = 2, 1


@pytest.fixture
def file(area: Area, mount: Path) -> Path:
    return mount / area.name


def map_file(agent: Agent, area: Area, file: Path) -> int:
    return agent.mmap(agent.open(str(file)), area.npages)


def names(mount: Path) -> list[str]:
    return sorted(path.name for path in mount.iterdir())


def test_what_it_is(area: Area, file: Path, mount: Path) -> None:
    known = file.stat()
    assert stat.S_ISREG(known.st_mode) and stat.S_IMODE(known.st_mode) == 0o660
    assert (known.st_size, known.st_uid, known.st_gid) == (area.size, os.getuid(), os.getgid())
    assert names(mount) == [area.name]
    fd = os.open(file, os.O_RDWR)
    assert os.lseek(fd, 0, os.SEEK_END) == area.size
    os.close(fd)


def test_it_is_served_like_the_node(area: Area, agent: Agent, file: Path) -> None:
    base = map_file(agent, area, file)
    pending = agent.touch_all(base, [12])
    assert take_pages(area, 1) == [12]
    serve(area, 12)
    assert pending[0].value() == content(12)
    assert agent.page_is(base, 12, content(12))


def test_fallocate_discards(area: Area, agent: Agent, file: Path) -> None:
    fd = agent.open(str(file))
    base = agent.mmap(fd, area.npages)
    serve(area, 0, 4)
    agent.sys("fallocate", fd, PUNCH | KEEP, PAGE, 2 * PAGE)  # cached
    assert agent.do("words", base, 4, PAGE) == [content(0), 0, 0, content(3)]
    agent.sys("fallocate", fd, PUNCH | KEEP, 10 * PAGE, PAGE)  # missing
    assert take(area, 1) == [(10, uapi.UMEM_REQUEST_ASYNC | uapi.UMEM_REQUEST_DISCARDED)]
    pending = agent.touch_all(base, [10])
    assert not pending[0].done(SHORT)
    area.mark([(10, 1)])
    assert pending[0].value() == 0


@pytest.mark.parametrize("mode", [0, KEEP, PUNCH, 0x10, 0x20])
def test_other_modes_of_fallocate_are_refused(
    area: Area, agent: Agent, file: Path, mode: int
) -> None:
    fd = agent.open(str(file))
    with pytest.raises(AgentError) as caught:
        agent.sys("fallocate", fd, mode, 0, PAGE)
    assert caught.value.errno == errno.EOPNOTSUPP
    assert area.stats().nr_discarded == 0


def test_it_keeps_its_size(file: Path, area: Area) -> None:
    os.truncate(file, area.size)
    for size in (0, area.size - PAGE, area.size + PAGE):
        with pytest.raises(PermissionError):
            os.truncate(file, size)
    assert file.stat().st_size == area.size


def test_its_permissions_can_be_set_and_stay(
    area: Area, file: Path, new_agent: Callable[..., Agent]
) -> None:
    stranger = new_agent(uid=1234)
    with pytest.raises(AgentError) as caught:
        stranger.open(str(file))
    assert caught.value.errno == errno.EACCES
    os.chown(file, 1234, 5678)
    file.chmod(0o600)
    known = file.stat()
    assert (known.st_uid, known.st_gid, stat.S_IMODE(known.st_mode)) == (1234, 5678, 0o600)
    base = map_file(stranger, area, file)
    serve(area, 1)
    assert stranger.word(base, 1) == content(1)


@pytest.mark.parametrize("call", ["create", "unlink", "rename", "link", "mkdir", "mknod"])
def test_nothing_can_be_made_or_removed(area: Area, file: Path, mount: Path, call: str) -> None:
    calls: dict[str, Callable[[], object]] = {
        "create": lambda: os.open(mount / "new", os.O_CREAT | os.O_RDWR),
        "unlink": lambda: file.unlink(),
        "rename": lambda: file.rename(mount / "other"),
        "link": lambda: os.link(file, mount / "other"),
        "mkdir": lambda: (mount / "dir").mkdir(),
        "mknod": lambda: os.mknod(mount / "fifo", stat.S_IFIFO),
    }
    with pytest.raises(OSError) as caught:
        calls[call]()
    assert caught.value.errno in (errno.EPERM, errno.EACCES)
    assert names(mount) == [area.name]


def test_areas_come_and_go(mount: Path) -> None:
    assert names(mount) == []
    assert not (mount / "first").exists()
    with Area.create("first", PAGE), Area.create("second", 2 * PAGE):
        assert names(mount) == ["first", "second"]
        assert (mount / "second").stat().st_size == 2 * PAGE
    assert not (mount / "first").exists()
    with Area.create("first", 5 * PAGE):  # another one of the same name
        assert (mount / "first").stat().st_size == 5 * PAGE


def test_many_areas_are_listed_once_each(mount: Path) -> None:
    made = [Area.create(f"many.{n}", PAGE) for n in range(300)]
    try:
        assert names(mount) == sorted(area.name for area in made)
    finally:
        for area in made:
            area.close()


def test_an_area_without_a_name_has_no_file(mount: Path) -> None:
    fd = uapi.open_control()
    got = uapi.init(fd, PAGE)
    assert names(mount) == []
    os.close(got.shmem_fd)
    os.close(fd)


def test_an_open_file_keeps_the_area_and_the_module(
    area: Area, agent: Agent, file: Path, mount: Path
) -> None:
    base = map_file(agent, area, file)
    serve(area, 2)
    area.close()
    assert names(mount) == [area.name]
    assert agent.word(base, 2) == content(2)
    agent.close()
    assert names(mount) == []


def test_a_mount_holds_the_module(tmp_path: Path) -> None:
    refs = module_refs()
    subprocess.run(["mount", "-t", "umem", "none", tmp_path], check=True)
    assert module_refs() > refs
    assert subprocess.run(["rmmod", "umem"], check=False, capture_output=True).returncode
    subprocess.run(["umount", tmp_path], check=True)
    assert module_refs() == refs


def test_it_cannot_be_read_or_written(file: Path) -> None:
    fd = os.open(file, os.O_RDWR)
    for call in (lambda: os.read(fd, 8), lambda: os.write(fd, b"x")):
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == errno.EINVAL
    os.close(fd)


def test_a_mount_stays_while_a_vm_uses_it(
    area: Area, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of `umemctl serve`: the VM is known by the path of its RAM when it leaves."""
    monkeypatch.setenv("UMEM_RUNTIME_DIR", str(tmp_path))
    with areafs.AreaDirectory() as directory:
        assert directory.path == tmp_path / "areas"
        ram = tmp_path / "areas" / area.name
        used = ram.open("rb")
    with used:
        assert areafs.is_area_file(ram.stat())
    with areafs.AreaDirectory() as directory:
        assert directory.path == tmp_path / "areas"
    assert tmp_path / "areas" not in areafs.mounts()
