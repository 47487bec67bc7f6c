# SPDX-License-Identifier: GPL-2.0-or-later
"""Room for pages, of files that look like the kernel's."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyumem.lanes.room import RESERVE, Room, groups_of

MIB = 1 << 20


class Kernel:
    """A /proc and a cgroup hierarchy in which process 7 is in /vms/one."""

    def __init__(self, tmp: Path) -> None:
        self.proc, self.root = tmp / "proc", tmp / "cgroup"
        self.group = self.root / "vms" / "one"
        self.group.mkdir(parents=True)
        for name in ("7", "self"):
            (self.proc / name).mkdir(parents=True)
        (self.proc / "7" / "cgroup").write_text("1:net_cls:/\n0::/vms/one\n")
        (self.proc / "self" / "mountinfo").write_text(
            f"22 1 0:20 / /proc rw shared:3 - proc proc rw\n"
            f"30 1 0:26 / {self.root} rw,nosuid shared:4 - cgroup2 none rw\n"
        )
        self.host(available=1 << 20, swap=0)
        self.set(self.group, max="max", current=100 * MIB)
        self.set(self.group.parent, max=200 * MIB, current=100 * MIB)

    def host(self, available: int, swap: int) -> None:
        (self.proc / "meminfo").write_text(
            f"MemTotal: 9 kB\nMemAvailable: {available} kB\nSwapFree: {swap} kB\nHugePages: 0\n"
        )

    def set(self, group: Path, **values: object) -> None:
        for name, value in values.items():
            (group / f"memory.{name.replace('swap_', 'swap.')}").write_text(f"{value}\n")

    def lacks(self, nr_bytes: int = 4096) -> str:
        return Room(groups_of(7, self.proc), self.proc).lacks(nr_bytes)


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    return Kernel(tmp_path)


def test_the_groups_of_a_process(kernel: Kernel) -> None:
    assert groups_of(7, kernel.proc) == [kernel.group, kernel.group.parent, kernel.root]
    assert groups_of(8, kernel.proc) == []


def test_it_looks_more_often_where_there_is_less(kernel: Kernel) -> None:
    for available, every in ((16 << 20, 16), (128 << 10, 2), (8 << 10, 1)):
        kernel.host(available=available, swap=0)
        kernel.set(kernel.group.parent, max="max")
        room = Room(groups_of(7, kernel.proc), kernel.proc)
        assert room.lacks(MIB) == ""
        kernel.host(available=0, swap=0)
        written = 0
        while not room.lacks(MIB):
            written += 1
        assert written == every - 1, available
    kernel.host(available=16 << 20, swap=0)
    kernel.set(kernel.group.parent, max=300 * MIB)  # 200 are left
    room = Room(groups_of(7, kernel.proc), kernel.proc)
    assert room.lacks(MIB) == ""
    kernel.set(kernel.group.parent, max=100 * MIB, stat="active_file 0\ninactive_file 0")
    assert [room.lacks(MIB) != "" for _ in range(4)] == [False, False, False, True]


def test_a_limit_anywhere_above_counts(kernel: Kernel) -> None:
    assert kernel.lacks() == ""
    parent = kernel.group.parent
    kernel.set(parent, current=200 * MIB - RESERVE, stat="active_file 0\ninactive_file 0")
    assert kernel.lacks() == f"memory.max of {parent}"
    kernel.set(parent, max=201 * MIB)
    assert kernel.lacks() == ""
    assert kernel.lacks(2 * MIB) != ""


def test_files_and_swap_are_room(kernel: Kernel) -> None:
    kernel.set(kernel.group, max=100 * MIB, stat="anon 5\nactive_file 0\ninactive_file 0")
    assert kernel.lacks()
    kernel.set(kernel.group, stat=f"active_file {3 * MIB}\ninactive_file {2 * MIB}")
    assert not kernel.lacks()
    kernel.set(kernel.group, stat="active_file 0\ninactive_file 0")
    kernel.host(available=1 << 20, swap=1 << 20)
    assert not kernel.lacks()
    kernel.set(kernel.group, swap_max=10 * MIB, swap_current=8 * MIB)
    assert kernel.lacks()


def test_a_host_without_memory(kernel: Kernel) -> None:
    kernel.host(available=RESERVE >> 10, swap=0)
    assert kernel.lacks() == "the host's memory"
    kernel.host(available=RESERVE >> 10, swap=4)
    assert not kernel.lacks()


def test_it_looks_always_while_there_is_none(kernel: Kernel) -> None:
    kernel.host(available=8 << 10, swap=0)
    room = Room(groups_of(7, kernel.proc), kernel.proc)
    assert not room.lacks(4096)
    kernel.host(available=0, swap=0)
    assert not room.lacks(MIB // 2), "not looked at yet"
    assert room.lacks(MIB // 2) and room.lacks(4096)
    kernel.host(available=1 << 20, swap=0)
    assert not room.lacks(4096)


def test_a_system_that_tells_nothing(tmp_path: Path) -> None:
    assert not Room((), tmp_path / "nothing").lacks(MIB)
