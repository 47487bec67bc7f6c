# SPDX-License-Identifier: GPL-2.0-or-later
"""kmod/packaging/60-umem.rules, as the machine's own udevd understands it."""

from __future__ import annotations

import grp
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyumem import uapi
from pyumem.area import Area

from .support import PAGE, wait_until

RULES = Path(__file__).parents[2] / "kmod/packaging/60-umem.rules"
BY_NAME = Path("/dev/umem-by-name")


def udevadm(*words: str) -> str:
    """Return what udevadm says, on either of its outputs."""
    done = subprocess.run(["udevadm", *words], check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


def reload_rules() -> None:
    udevadm("control", "--reload", "--timeout=20")


def owner(path: str) -> tuple[int, int, int]:
    """Return uid, gid and permissions of a file."""
    status = Path(path).stat()
    return status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)


@pytest.fixture(scope="module")
def kvm_gid() -> int:
    """The group of those who run VMs; not every host has it."""
    try:
        return grp.getgrnam("kvm").gr_gid
    except KeyError:
        with Path("/etc/group").open("a") as groups:  # of the test machine
            groups.write("kvm:x:60107:\n")
        return 60107


@pytest.fixture
def rules(kvm_gid: int) -> Iterator[Path]:
    """The rules are in force for the time of a test."""
    assert grp.getgrgid(kvm_gid).gr_name == "kvm"
    installed = Path("/run/udev/rules.d") / RULES.name
    installed.parent.mkdir(parents=True, exist_ok=True)
    installed.write_bytes(RULES.read_bytes())
    before = owner(uapi.DEVICE)
    reload_rules()
    yield installed
    installed.unlink()
    reload_rules()
    os.chown(uapi.DEVICE, *before[:2])
    Path(uapi.DEVICE).chmod(before[2])


@pytest.mark.usefixtures("rules")
def test_the_group_of_the_control_node(kvm_gid: int) -> None:
    os.chown(uapi.DEVICE, 0, 0)
    Path(uapi.DEVICE).chmod(0o600)
    udevadm("trigger", "--action=change", "--settle", "/sys/class/misc/umem")
    wait_until(lambda: owner(uapi.DEVICE) == (0, kvm_gid, 0o660), "the rule is applied")


@pytest.mark.usefixtures("rules")
@pytest.mark.parametrize("name", ["vm1.ram0", "a:b+c-d._"])
def test_a_node_has_its_group_and_a_link_by_name(kvm_gid: int, name: str) -> None:
    with Area.create(name, 4 * PAGE) as area:
        link = BY_NAME / name
        wait_until(link.is_symlink, "the link is there")
        wait_until(lambda: owner(area.node) == (0, kvm_gid, 0o660), "the group is set")
        assert link.resolve() == Path(area.node)
        with link.open("rb") as node:  # it is the area's
            assert node.seek(0, os.SEEK_END) == 4 * PAGE
    wait_until(lambda: not link.is_symlink(), "the link is gone with the area")


@pytest.mark.usefixtures("rules")
def test_two_areas_after_each_other_under_one_name() -> None:
    """The link is the new one's, whichever event comes first."""
    for _ in range(2):
        with Area.create("again", PAGE) as area:
            wait_until(
                lambda area=area: (BY_NAME / "again").resolve() == Path(area.node),  # type: ignore[misc]
                "the link leads to the new node",
            )
    wait_until(lambda: not (BY_NAME / "again").is_symlink(), "the link is gone with the area")


def test_the_rules_engine_has_nothing_to_say_against_them(rules: Path) -> None:
    """udevadm test begins a line with file and line number for what it does not understand."""
    with Area.create("said", PAGE) as area:
        for path in ("/sys/class/misc/umem", f"/sys/class/umem/{Path(area.node).name}"):
            said = udevadm("test", path)
            # What it applies comes behind the name of the device.
            assert f"\n{rules}:" not in said, said
            assert f": {rules}:" in said, said
        # The negative control: a key that there is not.
        rules.write_text(RULES.read_text().replace('MODE="0660"', 'MODUS="0660"'))
        said = udevadm("test", "/sys/class/misc/umem")
        assert f"\n{rules}:" in said, said
