# SPDX-License-Identifier: GPL-2.0-or-later
"""What the two sides say to each other when a committed migration is taken up again.

The source connects, HELLO says resume, and the destination answers with VERDICT: what became of the
VM.  Of a VM that is there and lacks pages it then says which it has (HAVE): the driver knows it
exactly, since the old lanes are closed by then.  What is not in HAVE is sent, again if need be;
nothing else has to be remembered on either side.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from pyumem import wire
from pyumem.area import Area
from pyumem.claims import ClaimMap
from pyumem.errors import LinkError, ProtocolError
from pyumem.greeting import AsyncLink
from pyumem.hello import AreaSpec, text
from pyumem.ram import PAGE_SIZE
from pyumem.wire import Kind

_CHUNK_WORDS: Final = wire.MAX_BITMAP // 8


class Fate(StrEnum):
    """What became of a VM, as its destination knows it."""

    HERE = "here"  # it is the destination's, and lacks pages
    COMPLETE = "complete"  # it is the destination's and has all its memory
    ENDED = "ended"  # it was the destination's, and its guest has ended there
    GONE = "gone"  # it was the destination's, and its QEMU died there
    ABORTED = "aborted"  # COMMIT never came: it is the source's


@dataclass(frozen=True, slots=True)
class Verdict:
    """The destination's answer to a resume."""

    fate: Fate
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"fate": self.fate.value, "reason": self.reason[:2000]}

    @classmethod
    def from_json(cls, message: dict[str, Any]) -> Verdict:
        """Check and read the JSON form.  Raises ProtocolError."""
        try:
            fate = Fate(text(message, "fate"))
        except ValueError:
            raise ProtocolError(f"unknown fate {message['fate']!r}") from None
        return cls(fate, text(message, "reason", longest=2000))


async def hear_verdict(link: AsyncLink) -> Verdict:
    """Return what the destination says after WELCOME.  Raises LinkError, ProtocolError."""
    header, payload = await _next(link, Kind.VERDICT)
    return Verdict.from_json(wire.unpack_json(header.kind, payload))


async def tell_have(link: AsyncLink, areas: Sequence[Area]) -> None:
    """Say which pages every area has, in their order.  Raises LinkError, DriverError."""
    for index, area in enumerate(areas):
        words = area.page_bitmap()
        if sys.byteorder == "big":
            words.byteswap()
        for at in range(0, len(words), _CHUNK_WORDS):
            pgoff = 64 * at
            count = min(64 * _CHUNK_WORDS, area.npages - pgoff)
            bits = words[at : at + _CHUNK_WORDS].tobytes()[: -(-count // 8)]
            await link.send(wire.pack_bitmap(index, pgoff, count, bits))


async def hear_have(link: AsyncLink, areas: Sequence[AreaSpec], claims: ClaimMap) -> None:
    """Have the claim map say of each page whether the destination has it.

    No lane uses the map meanwhile.  Raises LinkError, ProtocolError.
    """
    for index, area in enumerate(areas):
        npages, pgoff = area.size // PAGE_SIZE, 0
        while pgoff < npages:
            header, bits = await _next(link, Kind.HAVE)
            wire.check_bitmap(header, area.id, npages)
            if (header.area, header.pgoff) != (index, pgoff):
                raise ProtocolError(
                    f"{link.peer}: HAVE from page {header.pgoff} of area number {header.area} on, "
                    f"page {pgoff} of area {area.id} is next"
                )
            claims.know(claims.slots.slot(index, pgoff), header.count, bits)
            pgoff += header.count


async def _next(link: AsyncLink, kind: Kind) -> tuple[wire.Header, memoryview]:
    while (frame := await link.receive()) is not None:
        if frame[0].kind is kind:
            return frame
        if frame[0].kind is not Kind.PING:
            raise ProtocolError(f"{link.peer}: {frame[0].kind.name} instead of {kind.name}")
    raise LinkError(f"{link.peer}: closed the connection instead of {kind.name}")
