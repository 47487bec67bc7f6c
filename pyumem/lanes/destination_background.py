# SPDX-License-Identifier: GPL-2.0-or-later
"""A background lane at the destination: receive runs of pages that nobody asked for yet, until the
source says END.
"""

from __future__ import annotations

import socket
from typing import Any

from pyumem import wire
from pyumem.claims import Slots
from pyumem.errors import LinkError
from pyumem.lanes.fill import Arrivals, Filler, make_unpack
from pyumem.lanes.link import Link, make_link
from pyumem.lanes.room import Room, groups_of
from pyumem.stats import StatsBlock
from pyumem.worker import Channel, run


def serve(link: Link, filler: Filler) -> None:
    """Receive until END, or until a lane is lost on which nothing came.

    What the source has sent into such a lane it knows as not taken.  Raises LinkError,
    ProtocolError, DriverError.
    """
    used = False
    while True:
        try:
            header = link.header()
            if header is None:
                raise LinkError(f"{link.peer}: the source closed a background lane before its end")
        except LinkError:
            if used:
                raise
            return
        if header.kind is wire.Kind.END:
            return
        filler.take(header)
        used = True


def body(channel: Channel, message: dict[str, Any], fds: list[int]) -> None:
    """Set up from the start message: fds as in destination_urgent."""
    from pyumem.area import Area

    sock = socket.socket(fileno=fds[0])
    stats = StatsBlock.attach(fds[1])
    areas = [Area.from_fds(*pair) for pair in zip(fds[4::2], fds[5::2], strict=True)]
    slots = Slots([area.npages for area in areas])
    unpack = make_unpack(message["compression"])
    channel.send({"event": "ready"})
    if not channel.wait_go():
        return
    link = make_link(sock, message, stats)
    arrivals = Arrivals.attach(slots, fds[2:4])
    room = Room(groups_of(message["qemu_pid"]))
    filler = Filler(
        link,
        areas,
        arrivals,
        stats,
        room=room,
        touch=message["touch"],
        untouched=message["untouched"],
        unpack=unpack,
    )
    serve(link, filler)
    # The socket stays open until the parent ends this process: that is how the source sees that the
    # lane is alive.
    channel.send({"event": "drained"})
    channel.receive()


if __name__ == "__main__":
    run(body)
