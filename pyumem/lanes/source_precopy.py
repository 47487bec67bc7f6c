# SPDX-License-Identifier: GPL-2.0-or-later
"""A pre-copy lane at the source: round after round, send what the claim map of the rounds has free,
while the guest runs and goes on writing.

A page may be sent half old and half new.  It is in the log of writes then, and sent again.

A round is over when the destination has written all of it (ROUND, and ROUND back): a page goes on
whichever lane claims it, and what a slow one still carries must not come after what a fast one
brings in the next round.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, NoReturn

from pyumem import wire
from pyumem.claims import ClaimMap, Slots
from pyumem.errors import LinkError
from pyumem.lanes.link import Link, make_link
from pyumem.lanes.pacing import Pacer
from pyumem.lanes.serve_pages import RUN_PAGES, Sender, make_packer
from pyumem.ram import RamFile
from pyumem.stats import StatsBlock
from pyumem.worker import Channel, run

if TYPE_CHECKING:
    from pyumem.lanes.compress import Packer

_LOOK_MS: Final = 20


class PrecopyLane:
    """The loop."""

    def __init__(
        self,
        channel: Channel,
        link: Link,
        ram: Sequence[RamFile],
        claims: ClaimMap,
        stats: StatsBlock,
        packer: Packer | None = None,
    ) -> None:
        """Send on the link what the claim map says is free; compressed, if the packer says so."""
        self._restart = packer.decision.restart if packer else lambda: None
        self._channel = channel
        self._link = link
        self._claims = claims
        self._sender = Sender(link, ram, stats, packer)
        self._pacer = Pacer(claims, self._look, self._restart)
        self._poll = select.poll()
        self._poll.register(channel.fileno(), select.POLLIN)
        self._poll.register(link.fileno(), select.POLLIN)

    def run(self) -> None:
        """Do rounds as the parent wants them, until it says "end" or is gone.  Raises LinkError."""
        while command := self._command():
            if command == "end":
                self._end()
                return
            self._round()
            self._channel.send({"event": "round"})

    def _command(self) -> str:
        """Wait for a word of the parent; empty when it wants an end of the process."""
        for fd, _ in self._poll.poll():
            if fd == self._link.fileno():
                self._unexpected()
        message = self._channel.receive()
        return str(message[0].get("command", "")) if message else ""

    def _unexpected(self) -> NoReturn:
        # It says nothing but ROUND: other data or an end of file are both its end.
        raise LinkError(f"{self._link.peer}: the destination closed a pre-copy lane")

    def _round(self) -> None:
        slots = self._claims.slots
        # It stood still since the round before.
        self._restart()
        while True:
            longest = self._pacer.next_run(RUN_PAGES)
            if not (runs := self._claims.claim_runs(longest, wire.MAX_SCATTERED_RANGES)):
                break
            self._pacer.begins()
            area = slots.area_of(runs[0][0])
            base = slots.bases[area]
            sent = self._sender.send_runs(area, [(start - base, nr) for start, nr in runs])
            self._pacer.took(sent)
            self._look(0)
        self._link.send(wire.pack(wire.Kind.ROUND))
        header = self._link.header()
        if header is None or header.kind is not wire.Kind.ROUND:
            self._unexpected()

    def _look(self, wait_ms: int) -> bool:
        """Let so much time pass, and see whether the destination is still there.

        A word of the parent waits: there is none within a round but its end.  So it is never True.
        """
        for fd, events in self._poll.poll(wait_ms):
            if fd == self._link.fileno():
                self._unexpected()
            if events & ~select.POLLIN:
                raise LinkError(f"{self._link.peer}: this side is gone")
        return False

    def _end(self) -> None:
        self._link.send(wire.pack(wire.Kind.END))
        while self._link.untaken():
            self._look(_LOOK_MS)
        self._channel.send({"event": "drained"})
        # An open connection is how the destination sees that this side is alive.
        self._poll.unregister(self._link.fileno())
        self._channel.receive()


def body(channel: Channel, message: dict[str, Any], fds: list[int]) -> None:
    """Set up from the start message: fds as in source_urgent; claims are those of the rounds."""
    sock = socket.socket(fileno=fds[0])
    stats = StatsBlock.attach(fds[1])
    ram = [
        RamFile(fd, spec["id"], spec["size_bytes"], live=True)
        for fd, spec in zip(fds[3:], message["areas"], strict=True)
    ]
    claims = ClaimMap.attach(fds[2], Slots([one.npages for one in ram]))
    link = make_link(sock, message, stats)
    packer = make_packer(message["compression"], stats, live=True)
    channel.send({"event": "ready"})
    PrecopyLane(channel, link, ram, claims, stats, packer).run()


if __name__ == "__main__":
    run(body)
