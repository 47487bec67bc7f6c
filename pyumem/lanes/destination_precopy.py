# SPDX-License-Identifier: GPL-2.0-or-later
"""A pre-copy lane at the destination: receive pages, again and again, into the backing file, and
mark none of them.

What nobody may see yet may be overwritten: the driver lets nobody touch a page before its mark, and
that comes at the switch, from the parent, for what is not stale by then.
"""

from __future__ import annotations

import socket
from typing import Any

from pyumem import wire
from pyumem.claims import Slots
from pyumem.errors import LinkError
from pyumem.lanes.fill import PAGE_SIZE, AreaLike, Arrivals, Filler, Unpack, make_unpack
from pyumem.lanes.link import Link, make_link
from pyumem.lanes.room import Room, groups_of
from pyumem.stats import Counter, StatsBlock
from pyumem.worker import Channel, run


class PrecopyFiller(Filler):
    """Takes pages that may come more than once."""

    def _pages(self, header: wire.Header, area: AreaLike) -> None:
        pgoff, count = header.pgoff, header.count
        wire.check_pages(header, area.name, area.npages, PAGE_SIZE)
        self._receive(area, pgoff, count)
        self._stats.add(Counter.PAGES, count)

    def _scattered(self, header: wire.Header, area: AreaLike) -> None:
        ranges = self._scattered_ranges(header, area)
        self._receive_scattered(area, ranges)
        self._stats.add(Counter.PAGES, sum(count for _, count in ranges))

    def _unpack_pages(self, header: wire.Header, area: AreaLike, unpack: Unpack) -> None:
        wire.check_packed(header, area.name, area.npages, PAGE_SIZE)
        self._receive_packed(header, area, unpack)
        self._stats.add(Counter.PAGES, header.count)

    def _zero(self, header: wire.Header, area: AreaLike) -> None:
        ranges = wire.unpack_ranges(header, self._link.payload(header), area.name, area.npages)
        # They may have had content in an earlier round.
        self._punch(area, ranges)
        self._stats.add(Counter.ZERO_PAGES, sum(count for _, count in ranges))


def serve(link: Link, filler: Filler) -> None:
    """Receive until END.  Raises LinkError, ProtocolError, DriverError."""
    while (header := link.header()) is not None:
        if header.kind is wire.Kind.END:
            return
        if header.kind is wire.Kind.ROUND:
            link.send(wire.pack(wire.Kind.ROUND))
            continue
        filler.take(header)
    raise LinkError(f"{link.peer}: the source closed a pre-copy lane before its end")


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
    room = Room(groups_of(message["qemu_pid"]))
    arrivals = Arrivals.attach(slots, fds[2:4])
    serve(link, PrecopyFiller(link, areas, arrivals, stats, room=room, unpack=unpack))
    channel.send({"event": "drained"})
    channel.receive()


if __name__ == "__main__":
    run(body)
