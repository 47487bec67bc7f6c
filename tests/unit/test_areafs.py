# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the areas are files, as far as that can be seen without the driver."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pyumem import areafs

MOUNTINFO = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
31 22 0:45 / /run/umem/areas rw,relatime shared:5 - umem umem rw
32 22 0:45 / /run/a\\040blank/areas rw,relatime - umem none rw
33 22 0:46 / /run/umem rw - tmpfs umem rw
"""


def test_mounts_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda _path: MOUNTINFO)
    device = os.makedev(0, 45)
    assert areafs.mounts() == {
        Path("/run/umem/areas"): device,
        Path("/run/a blank/areas"): device,
    }


def test_without_a_mount_there_is_no_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As where the driver is not loaded, or serve does not run as root."""
    monkeypatch.setenv("UMEM_RUNTIME_DIR", str(tmp_path))
    with areafs.AreaDirectory() as directory:
        assert directory.path is None
    assert f"mount -t umem umem {tmp_path}/areas" in caplog.text


def test_what_a_killed_daemon_left_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("UMEM_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(areafs, "mounts", lambda: {tmp_path / "areas": 45})
    with areafs.AreaDirectory() as directory:
        assert directory.path == tmp_path / "areas"
