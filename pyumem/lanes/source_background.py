# SPDX-License-Identifier: GPL-2.0-or-later
"""A background lane at the source: send, in runs behind the cursor, what nobody asked for yet.

It begins when the parent says "go": after the VM has stopped, and with `migrate -n` not before the
user asks for it.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from pyumem import wire
from pyumem.claims import ClaimMap, Slots
from pyumem.errors import LinkError
from pyumem.lanes.link import Link, make_link
from pyumem.lanes.pacing import Pacer
from pyumem.lanes.serve_pages import RUN_PAGES, Sender, make_packer
from pyumem.lanes.window import Window
from pyumem.ram import PAGE_SIZE, RamFile
from pyumem.stats import StatsBlock
from pyumem.worker import Channel, run

if TYPE_CHECKING:
    from pyumem.lanes.compress import Packer

_HOLE_PAGES: Final = 16384
"""Pages of a hole that are claimed under the lock at a time: a request waits for that."""
_HOLE_RANGES: Final = 256
"""Ranges that are gathered before they are sent: whoever waits for a page in them waits for that.
"""
_LOOK_MS: Final = 20


class BackgroundLane:
    """The loop."""

    def __init__(
        self,
        channel: Channel,
        link: Link,
        ram: Sequence[RamFile],
        claims: ClaimMap,
        stats: StatsBlock,
        packer: Packer | None = None,
        *,
        index: int = 0,
        lanes: int = 1,
    ) -> None:
        """Send on the link what the claim map says is free; compressed, if the packer says so.
        index: which of how many background lanes it is.
        """
        self._packer = packer
        self._channel = channel
        self._link = link
        self._ram = ram
        self._claims = claims
        self._sender = Sender(link, ram, stats, packer)
        self._pacer = Pacer(
            claims, self._stopped, packer.decision.restart if packer else lambda: None
        )
        self._index = index
        self._window = Window(link.sock, link.untaken, claims, index, lanes)
        self._poll = select.poll()
        self._poll.register(channel.fileno(), select.POLLIN)
        self._poll.register(link.fileno(), select.POLLIN)

    def run(self) -> None:
        """Wait for "go", send until every page is claimed, then END; the first lane first tells
        what is a hole.  Raises LinkError.
        """
        if not self._go():
            return
        if (self._index or self._tell_holes()) and self._send_runs():
            self._window.leave()
            self._link.send(wire.pack(wire.Kind.END))
            if self._taken():
                self._channel.send({"event": "drained"})
        # Nothing more to send, but an open connection is how the destination sees that this side is
        # alive.
        self._idle()

    def _go(self) -> bool:
        for fd, _ in self._poll.poll():
            if fd == self._link.fileno():
                self._unexpected()
        return self._channel.wait_go()

    def _taken(self) -> bool:
        """Wait until the destination's kernel has everything: what it has is not lost with the
        connection.  False when the parent wants an end.
        """
        while self._link.untaken():
            if self._stopped(_LOOK_MS):
                return False
        return True

    def _stopped(self, wait_ms: int | None = 0) -> bool:
        """Tell whether the parent wants an end; wait so long for it, None for ever."""
        fds = [fd for fd, _ in self._poll.poll(wait_ms)]
        if self._channel.fileno() in fds:
            return True
        if fds:
            self._unexpected()
        return False

    def _unexpected(self) -> None:
        # The destination says nothing on this lane: data or an end of file are both its end.
        raise LinkError(f"{self._link.peer}: the destination closed a background lane")

    def _tell_holes(self) -> bool:
        for area, ram in enumerate(self._ram):
            base = self._claims.slots.bases[area]
            gathered: list[tuple[int, int]] = []
            for has_data, first, count in ram.extents(0, ram.npages):
                if has_data:
                    continue
                for at in range(first, first + count, _HOLE_PAGES):
                    part = min(_HOLE_PAGES, first + count - at)
                    gathered += (
                        (slot - base, nr) for slot, nr in self._claims.claim_range(base + at, part)
                    )
                if len(gathered) >= _HOLE_RANGES:
                    self._sender.zero(area, gathered)
                    gathered = []
                    if self._stopped():
                        return False
            self._sender.zero(area, gathered)
        return True

    def _send_runs(self) -> bool:
        slots = self._claims.slots
        while longest := self._pacer.next_run(RUN_PAGES):
            longest = min(longest, max(1, self._window.longest_run // PAGE_SIZE))
            if not self._wait_for_room(longest * PAGE_SIZE):
                return False
            if not (runs := self._claims.claim_runs(longest, wire.MAX_SCATTERED_RANGES)):
                return True
            self._pacer.begins()
            area = slots.area_of(runs[0][0])
            base = slots.bases[area]
            sent = self._sender.send_runs(area, [(start - base, nr) for start, nr in runs])
            self._pacer.took(sent)
            if self._stopped():
                return False
        return False

    def _wait_for_room(self, nr_bytes: int) -> bool:
        """Wait until the window lets so many bytes go.  False when the parent wants an end."""
        self._window.look()
        while not self._window.room(nr_bytes):
            time.sleep(self._window.patience_s)
            if self._stopped():
                return False
            self._window.look()
        return True

    def _idle(self) -> None:
        while not self._stopped(None):
            pass


def body(channel: Channel, message: dict[str, Any], fds: list[int]) -> None:
    """Set up from the start message: fds as in source_urgent."""
    sock = socket.socket(fileno=fds[0])
    stats = StatsBlock.attach(fds[1])
    ram = [
        RamFile(fd, spec["id"], spec["size_bytes"])
        for fd, spec in zip(fds[3:], message["areas"], strict=True)
    ]
    claims = ClaimMap.attach(fds[2], Slots([one.npages for one in ram]))
    link = make_link(sock, message, stats)
    packer = make_packer(message["compression"], stats)
    channel.send({"event": "ready"})
    BackgroundLane(
        channel,
        link,
        ram,
        claims,
        stats,
        packer,
        index=message["index"],
        lanes=message["background_lanes"],
    ).run()


if __name__ == "__main__":
    run(body)
