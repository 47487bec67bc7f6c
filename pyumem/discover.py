# SPDX-License-Identifier: GPL-2.0-or-later
"""Finding areas from outside: what sysfs and udev tell, without opening any of them."""

from __future__ import annotations

import errno
import os
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pyudev

from pyumem.area import node_path
from pyumem.errors import DriverError

SUBSYSTEM: Final = "umem"
UDEV_CONTROL: Final = Path("/run/udev/control")
_SLICE: Final = 1.0
"""Longest sleep between two looks at the node, in seconds: the netlink socket may drop a message.
"""


@dataclass(frozen=True, slots=True)
class Node:
    """An area by its node.  Sizes are bytes, cached granules, delivered requests; server_pid is 0
    without a server.
    """

    id: int
    path: str
    name: str
    size: int
    granule_size: int
    cached: int
    delivered: int
    served: bool
    server_pid: int


def list_nodes() -> list[Node]:
    """List the areas that have a node, by id.  An area that goes away meanwhile is left out."""
    nodes = []
    for device in pyudev.Context().list_devices(subsystem=SUBSYSTEM):
        try:
            nodes.append(_node(device))
        except (KeyError, OSError, pyudev.DeviceNotFoundError):
            continue
    return sorted(nodes, key=lambda node: node.id)


def _node(device: pyudev.Device) -> Node:
    attributes = device.attributes
    area_id = int(device.sys_number)
    return Node(
        id=area_id,
        path=device.device_node or node_path(area_id),
        name=attributes.asstring("name"),
        size=attributes.asint("size"),
        granule_size=attributes.asint("granule_size"),
        cached=attributes.asint("cached"),
        delivered=attributes.asint("delivered"),
        served=attributes.asbool("served"),
        server_pid=attributes.asint("server_pid"),
    )


def _state(path: str, access: int) -> int:
    """Return 0 when the node can be used, else the errno that says why not."""
    try:
        mode = Path(path).stat().st_mode
    except OSError as e:
        return e.errno or errno.EIO
    if not stat.S_ISCHR(mode):
        return errno.ENODEV
    return 0 if os.access(path, access, effective_ids=True) else errno.EACCES


def wait_for_node(area_id: int, timeout: float, *, access: int = os.R_OK | os.W_OK) -> Path:
    """Wait until /dev/umemN exists and this process may use it; return its path.

    timeout is in seconds.  Where udevd runs its own events are awaited, since a rule of its may
    change the permissions after the kernel made the node; else the kernel's.  Raises DriverError
    after the timeout: ENOENT when there is no node, EACCES when its permissions do not allow
    `access`, ENODEV when something else is in its place.
    """
    path = node_path(area_id)
    problem = _state(path, access)
    if not problem:
        return Path(path)
    deadline = time.monotonic() + timeout
    source = "udev" if UDEV_CONTROL.exists() else "kernel"
    monitor = pyudev.Monitor.from_netlink(pyudev.Context(), source=source)
    try:
        monitor.filter_by(SUBSYSTEM)
        # Listen first, look then: an event between the two is not lost.
        monitor.start()
        while problem := _state(path, access):
            left = deadline - time.monotonic()
            if left <= 0:
                what = f"no usable {path} after {timeout:g} s"
                raise DriverError(what, problem, area=f"umem{area_id}")
            monitor.poll(timeout=min(left, _SLICE))
        return Path(path)
    finally:
        # Its socket is closed with the last reference, and a traceback would keep this one.
        del monitor
