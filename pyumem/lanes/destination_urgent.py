# SPDX-License-Identifier: GPL-2.0-or-later
"""The urgent lane at the destination: the way of a page from the guest's fault to its wake, as far
as user space goes.

    guest touches a missing page -> the driver queues a request and the vCPU sleeps
    -> poll() says so, requests() reads a batch                                          (_ask)
    -> one REQUEST frame to the source
    -> a PAGES frame comes back; its payload is received into a buffer and written to the
    backing file (Filler.take)
    -> mark(): the driver sets the cached bit and wakes the vCPU

One thread, one poll.  Requests never wait for room in the socket while pages could be received:
what the socket does not take stays in _out and the driver is not asked for more until it went.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Sequence
from typing import Any

from pyumem import wire
from pyumem.claims import Slots
from pyumem.errors import LinkError
from pyumem.lanes.fill import AreaLike, Arrivals, Filler
from pyumem.lanes.link import Link, make_link
from pyumem.lanes.room import Room, groups_of
from pyumem.stats import Counter, StatsBlock
from pyumem.uapi import UMEM_REQUEST_DISCARDED
from pyumem.worker import Channel, hurry, run


class UrgentLane:
    """The loop."""

    def __init__(
        self,
        channel: Channel,
        link: Link,
        areas: Sequence[AreaLike],
        arrivals: Arrivals,
        stats: StatsBlock,
        *,
        room: Room | None = None,
        touch: bool = False,
        untouched: bool = False,
        resumed: bool = False,
    ) -> None:
        """Serve the areas over the link, while there is room.  touch, untouched: as for Filler;
        resumed: ask again for what was asked for on a lane that was lost.
        """
        self._resumed = resumed
        self._channel = channel
        self._link = link
        self._areas = areas
        self._arrivals = arrivals
        self._stats = stats
        self._filler = Filler(
            link, areas, arrivals, stats, room=room, touch=touch, untouched=untouched
        )
        self._out = bytearray()

    def run(self) -> None:
        """Serve until the parent says stop.  Raises LinkError, ProtocolError, DriverError."""
        lane, parent = self._link.fileno(), self._channel.fileno()
        by_fd = {area.fileno(): index for index, area in enumerate(self._areas)}
        poll = select.poll()
        poll.register(lane, select.POLLIN)
        poll.register(parent, select.POLLIN)
        for fd in by_fd:
            poll.register(fd, select.POLLIN)
        if self._resumed:
            self._ask_again()
        listening = True
        while True:
            if listening == bool(self._out):
                listening = not self._out
                poll.modify(lane, select.POLLIN if listening else select.POLLIN | select.POLLOUT)
                for fd in by_fd:
                    # 0 still reports errors, which _ask() turns into the driver's own words.
                    poll.modify(fd, select.POLLIN if listening else 0)
            for fd, events in poll.poll():
                if fd == lane:
                    if events & select.POLLOUT:
                        self._flush()
                    if events & ~select.POLLOUT:
                        self._receive()
                elif fd == parent:
                    return  # there is one command, and it is to stop
                elif listening or events & ~select.POLLIN:
                    self._ask(by_fd[fd])

    def _ask(self, index: int) -> None:
        """Read a batch of requests off the driver and send them."""
        records = self._areas[index].requests()
        base = self._arrivals.slots.bases[index]
        wanted, discarded = [], []
        words = records.tolist()
        for pgoff, flags in zip(words[0::2], words[1::2], strict=True):
            if flags & UMEM_REQUEST_DISCARDED:
                discarded.append(pgoff)
            elif self._arrivals.asked_now(base + pgoff):
                wanted.append(pgoff)
        self._stats.add(Counter.REQUESTS, len(wanted))
        self._say(wire.Kind.REQUEST, index, wanted)
        self._say(wire.Kind.DISCARD, index, discarded)
        self._flush()

    def _say(self, kind: wire.Kind, index: int, granules: list[int]) -> None:
        """Put frames for all pages of these granules, given by their first pages, into _out."""
        step = self._areas[index].granule_pages
        pages = granules
        if step > 1:
            pages = [page for first in granules for page in range(first, first + step)]
        for at in range(0, len(pages), wire.MAX_OFFSETS):
            self._out += wire.pack_offsets(kind, index, pages[at : at + wire.MAX_OFFSETS])

    def _ask_again(self) -> None:
        """Ask for what the driver knows as requested and missing.

        What it delivers besides, or delivers again, is asked for once.
        """
        for index, area in enumerate(self._areas):
            base = self._arrivals.slots.bases[index]
            pages = [page for page in area.open_requests() if self._arrivals.asked_now(base + page)]
            self._say(wire.Kind.REQUEST, index, pages)
            self._stats.add(Counter.REQUESTS, len(pages))
        self._flush()

    def _flush(self) -> None:
        if self._out:
            del self._out[: self._link.send_some(self._out)]

    def _receive(self) -> None:
        while True:
            header = self._link.header()
            if header is None:
                raise LinkError(f"{self._link.peer}: the source closed the urgent lane")
            self._filler.take(header)
            if not self._link.pending():
                return


def body(channel: Channel, message: dict[str, Any], fds: list[int]) -> None:
    """Set up from the start message: fds are the socket, stats, received, asked, then server_fd and
    shmem_fd of each area.
    """
    from pyumem.area import Area

    hurry()
    sock = socket.socket(fileno=fds[0])
    stats = StatsBlock.attach(fds[1])
    areas = [Area.from_fds(*pair) for pair in zip(fds[4::2], fds[5::2], strict=True)]
    slots = Slots([area.npages for area in areas])
    for area in areas:
        area.set_blocking(False)
    channel.send({"event": "ready"})
    arrivals = Arrivals.attach(slots, fds[2:4])
    # The parent has to say WELCOME on the socket first.
    if channel.wait_go():
        link = make_link(sock, message, stats)
        UrgentLane(
            channel,
            link,
            areas,
            arrivals,
            stats,
            room=Room(groups_of(message["qemu_pid"])),
            touch=message["touch"],
            untouched=message["untouched"],
            resumed=message["resumed"],
        ).run()


if __name__ == "__main__":
    run(body)
