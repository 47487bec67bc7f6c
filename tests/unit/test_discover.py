# SPDX-License-Identifier: GPL-2.0-or-later
"""What discover.py does without a driver: waiting, its verdict on a node, devices that go away."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from pyumem import discover
from pyumem.errors import DriverError


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "umem3"
    monkeypatch.setattr(discover, "node_path", lambda _id: str(path))
    return path


def test_a_node_that_is_there_is_not_waited_for(node: Path) -> None:
    # A character device that everybody may use; a link, so that no CAP_MKNOD is needed.
    node.symlink_to("/dev/null")
    began = time.monotonic()
    assert discover.wait_for_node(3, 10) == node
    assert time.monotonic() - began < 1


@pytest.mark.usefixtures("node")
def test_no_node_is_an_error_with_its_name() -> None:
    began = time.monotonic()
    with pytest.raises(DriverError, match=r"area umem3: no usable .*umem3 after 0\.2 s") as caught:
        discover.wait_for_node(3, 0.2)
    assert caught.value.errno == errno.ENOENT
    assert 0.2 <= time.monotonic() - began < 2


def test_a_node_that_comes_while_waiting_is_found(node: Path) -> None:
    timer = threading.Timer(0.3, node.symlink_to, ["/dev/null"])
    timer.start()
    # No event tells of a link, so this also shows that a lost event costs a slice, not the timeout.
    assert discover.wait_for_node(3, 10) == node
    timer.join()


def test_something_else_in_its_place(node: Path) -> None:
    node.write_text("")
    with pytest.raises(DriverError) as caught:
        discover.wait_for_node(3, 0)
    assert caught.value.errno == errno.ENODEV


def test_missing_permission_is_told_from_a_missing_node(
    node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.symlink_to("/dev/null")
    monkeypatch.setattr(os, "access", lambda *_args, **_more: False)  # root may do anything
    with pytest.raises(DriverError) as caught:
        discover.wait_for_node(3, 0)
    assert caught.value.errno == errno.EACCES


class Attributes(dict[str, str]):
    """pyudev's Attributes, as far as discover.py uses it."""

    def asstring(self, name: str) -> str:
        return self[name]

    def asint(self, name: str) -> int:
        return int(self[name])

    def asbool(self, name: str) -> bool:
        return {"1": True, "0": False}[self[name]]


def device(number: int, **changes: str) -> SimpleNamespace:
    attributes = Attributes(
        name=f"vm{number}.ram0",
        size="1048576",
        granule_size="4096",
        cached="3",
        delivered="5",
        served="1",
        server_pid="42",
    )
    attributes.update(changes)
    return SimpleNamespace(
        attributes=attributes, sys_number=str(number), device_node=f"/dev/umem{number}"
    )


def test_list_is_by_id_and_survives_an_area_that_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = device(4)
    del gone.attributes["size"]
    devices = [device(10), gone, device(2, served="0", server_pid="0")]
    context = SimpleNamespace(list_devices=lambda **_filter: devices)
    monkeypatch.setattr("pyumem.discover.pyudev.Context", lambda: context)
    assert discover.list_nodes() == [
        discover.Node(2, "/dev/umem2", "vm2.ram0", 1048576, 4096, 3, 5, False, 0),
        discover.Node(10, "/dev/umem10", "vm10.ram0", 1048576, 4096, 3, 5, True, 42),
    ]
