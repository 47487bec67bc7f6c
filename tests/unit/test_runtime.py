# SPDX-License-Identifier: GPL-2.0-or-later
"""Directories, names and locks."""

from __future__ import annotations

import os
import socket
import stat
import struct
from pathlib import Path

import pytest

from pyumem import runtime
from pyumem.errors import ControlError, UsageError


def test_directories(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("UMEM_RUNTIME_DIR", "XDG_RUNTIME_DIR", "UMEM_RAM_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert runtime.runtime_dir() == Path("/run/umem")
    assert runtime.ram_dir() == Path("/dev/shm/umem")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(runtime, "OF_HOST", Path("/nowhere"))
    with pytest.raises(UsageError, match="XDG_RUNTIME_DIR"):
        runtime.runtime_dir()
    assert runtime.ram_dir() == Path("/dev/shm/umem-1000")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    assert runtime.runtime_dir() == Path("/run/user/1000/umem")
    monkeypatch.setenv("UMEM_RUNTIME_DIR", "/x")
    assert runtime.qmp_socket("vm1") == Path("/x/vm/vm1/qmp.sock")
    assert runtime.incoming_socket("vm1") == Path("/x/vm/vm1/incoming.sock")
    assert runtime.serve_socket() == Path("/x/serve.sock")
    assert runtime.commit_record("vm1") == Path("/x/migrate/vm1.json")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "x" * 64, "\u00e4", "a\n"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(UsageError, match="cannot be a VM's name"):
        runtime.vm_dir(name)


def test_a_lock_names_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    taken = pytest.raises(ControlError, match=f"it runs already .pid {os.getpid()} holds")
    with runtime.LockFile(path, "it runs already"), taken:
        runtime.LockFile(path, "it runs already").__enter__()
    with runtime.LockFile(path, "it runs already") as lock:
        assert lock.fileno() >= 0


def test_only_ram_that_umem_qemu_made_is_removed(tmp_path: Path) -> None:
    """Where it is does not matter: umemctl and umem-qemu may have different environments."""
    (tmp_path / "vm1").mkdir()
    ram = tmp_path / "vm1" / "ram0"
    ram.touch()
    runtime.remove_ram(ram)
    assert ram.exists()
    runtime.ram_mark(ram).touch()
    ram.with_name("ram1").touch()
    runtime.remove_ram(ram)
    assert not ram.exists() and ram.with_name("ram1").exists()
    runtime.remove_ram(ram.with_name("ram1"))
    assert not ram.parent.exists() and tmp_path.exists()


def test_private(tmp_path: Path) -> None:
    made = runtime.make_private(tmp_path / "a")
    assert made.stat().st_mode & 0o777 == 0o700
    assert runtime.make_private(made) == made


@pytest.mark.parametrize(
    ("record", "left"),
    [
        (None, False),
        ('{"committed": false}', False),
        ('{"committed": true}', True),
        ("{}", True),
        ("[]", True),
        ("", True),
    ],
)
def test_a_vm_has_left_unless_its_record_says_that_it_has_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: str | None, left: bool
) -> None:
    monkeypatch.setenv("UMEM_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "migrate").mkdir()
    if record is not None:
        runtime.commit_record("vm1").write_text(record)
    assert runtime.has_left("vm1") is left


# --- the runtime directory of a host ---


def acl(*entries: tuple[int, int, int]) -> bytes:
    """acl(5) as the kernel takes it: tag, permissions, uid of each entry."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


USER_OBJ, USER, GROUP_OBJ, MASK, OTHER, NOBODY = 1, 2, 4, 16, 32, 0xFFFFFFFF


def test_only_the_daemon_is_let_in(tmp_path: Path) -> None:
    plain = runtime.make_private(tmp_path / "plain")
    assert not runtime.let_daemon_in(plain)
    assert stat.S_IMODE(plain.stat().st_mode) == 0o700
    entries = ((USER_OBJ, 7, NOBODY), (USER, 7, 4711), (GROUP_OBJ, 0, NOBODY))
    default = acl(*entries, (MASK, 7, NOBODY), (OTHER, 0, NOBODY))
    (tmp_path / "vm").mkdir()
    os.setxattr(tmp_path / "vm", "system.posix_acl_default", default)
    own = runtime.make_private(tmp_path / "vm" / "vm1")
    assert runtime.let_daemon_in(own)
    allowed = os.getxattr(own, "system.posix_acl_access")
    assert allowed == acl(*entries, (MASK, 5, NOBODY), (OTHER, 0, NOBODY))
    assert not runtime.let_daemon_connect(own / "qmp.sock")
    with socket.socket(socket.AF_UNIX) as qmp:
        qmp.bind(str(own / "qmp.sock"))
        assert runtime.let_daemon_connect(own / "qmp.sock")
        allowed = os.getxattr(own / "qmp.sock", "system.posix_acl_access")
        assert allowed == acl(*entries, (MASK, 7, NOBODY), (OTHER, 0, NOBODY))


def test_the_runtime_directory_of_who_may_have_vms_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("UMEM_RUNTIME_DIR", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "own"))
    monkeypatch.setattr(runtime, "OF_HOST", tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    assert runtime.runtime_dir() == tmp_path / "own" / "umem"
    (tmp_path / "vm").mkdir()
    assert runtime.runtime_dir() == tmp_path
