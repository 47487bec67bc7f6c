# SPDX-License-Identifier: GPL-2.0-or-later
"""The urgent lane at the source: answer requests, each page once, before anything else; then, while
nobody asks, send their neighbours (pyumem.lanes.prefetch).

No page is read before the parent says "go", which it does when the VM has stopped: until then its
memory still changes.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator, Sequence
from typing import Any, Final

from pyumem import wire
from pyumem.claims import ClaimMap, Slots
from pyumem.errors import LinkError, ProtocolError
from pyumem.lanes.link import Link, make_link
from pyumem.lanes.prefetch import NO_PREFETCH, Ahead, Prefetch
from pyumem.lanes.serve_pages import Sender
from pyumem.ram import RamFile
from pyumem.stats import Counter, StatsBlock
from pyumem.worker import Channel, hurry, run

_UNTAKEN: Final = 64 * 1024
"""Bytes on their way above which neighbours wait."""
_LOOK_MS: Final = 1


def runs(sorted_pages: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Join neighbours: yield (first, count)."""
    start = count = 0
    for page in sorted_pages:
        if count and page == start + count:
            count += 1
            continue
        if count:
            yield start, count
        start, count = page, 1
    if count:
        yield start, count


class UrgentLane:
    """The loop."""

    def __init__(
        self,
        channel: Channel,
        link: Link,
        ram: Sequence[RamFile],
        claims: ClaimMap,
        stats: StatsBlock,
        *,
        prefetch: Prefetch = NO_PREFETCH,
    ) -> None:
        """Answer the link from these RAM blocks."""
        self._channel = channel
        self._link = link
        self._ram = ram
        self._claims = claims
        self._stats = stats
        self._sender = Sender(link, ram, stats)
        self._ahead = Ahead(prefetch, [block.npages for block in ram])

    def run(self) -> None:
        """Wait for "go", then answer until the parent says stop.

        Raises LinkError, ProtocolError.
        """
        if not self._channel.wait_go():
            return
        lane, parent = self._link.fileno(), self._channel.fileno()
        poll = select.poll()
        poll.register(lane, select.POLLIN)
        poll.register(parent, select.POLLIN)
        while True:
            patience = self._patience()
            ready = poll.poll(patience)
            for fd, _ in ready:
                if fd == parent:
                    return
                self._answer()
                while self._link.pending():
                    self._answer()
            if not ready and patience == 0:
                self._send_ahead()

    def _patience(self) -> int | None:
        """Milliseconds to wait for a request before a neighbour is sent; None for ever.

        What was sent and not taken is ahead of the next requested page: it is kept short.
        """
        if not self._ahead:
            return None
        return _LOOK_MS if self._link.untaken() > _UNTAKEN else 0

    def _send_ahead(self) -> None:
        area, first, count = self._ahead.take()
        base = self._claims.slots.bases[area]
        for slot, nr in self._claims.claim_range(base + first, count):
            self._stats.add(Counter.PREFETCHED, nr)
            self._sender.send(area, slot - base, nr)

    def _answer(self) -> None:
        header = self._link.header()
        if header is None:
            raise LinkError(f"{self._link.peer}: the destination closed the urgent lane")
        try:
            self._take(header)
        except ProtocolError as e:
            raise ProtocolError(f"{self._link.peer}: {e}") from None

    def _take(self, header: wire.Header) -> None:
        kind, area = header.kind, header.area
        if kind not in (wire.Kind.REQUEST, wire.Kind.DISCARD):
            raise ProtocolError(f"{kind.name} does not belong on this lane")
        if area >= len(self._ram):
            raise ProtocolError(f"{kind.name} for area number {area}, there are {len(self._ram)}")
        ram = self._ram[area]
        offsets = wire.unpack_offsets(header, self._link.payload(header), ram.name, ram.npages)
        base = self._claims.slots.bases[area]
        if kind is wire.Kind.DISCARD:
            # Whatever is here does not count any more.  What another lane claimed is on its way;
            # the driver zeroes it at the mark.
            ranges = [
                (slot - base, count)
                for pgoff in offsets
                for slot, count in self._claims.claim_range(base + pgoff, 1)
            ]
            self._sender.zero(area, ranges)
            return
        mine = self._claims.claim([base + pgoff for pgoff in offsets])
        self._stats.add(Counter.REQUESTS, len(offsets))
        self._stats.add(Counter.REQUESTS_STALE, len(offsets) - len(mine))
        # In the order of the faults; neighbours that were asked for together go together.
        for start, count in runs(mine):
            self._sender.send(area, start - base, count)
            self._ahead.requested(area, start - base, count)


def body(channel: Channel, message: dict[str, Any], fds: list[int]) -> None:
    """Set up from the start message: fds are the socket, stats, claims, then the file of each RAM
    block.
    """
    hurry()
    sock = socket.socket(fileno=fds[0])
    stats = StatsBlock.attach(fds[1])
    ram = [
        RamFile(fd, spec["id"], spec["size_bytes"])
        for fd, spec in zip(fds[3:], message["areas"], strict=True)
    ]
    claims = ClaimMap.attach(fds[2], Slots([one.npages for one in ram]))
    link = make_link(sock, message, stats)
    channel.send({"event": "ready"})
    prefetch = Prefetch.from_json(message["prefetch"])
    UrgentLane(channel, link, ram, claims, stats, prefetch=prefetch).run()


if __name__ == "__main__":
    run(body)
