# SPDX-License-Identifier: GPL-2.0-or-later
"""Directories, names and locks."""

from __future__ import annotations

import os
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
