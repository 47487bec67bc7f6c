# SPDX-License-Identifier: GPL-2.0-or-later
"""What all page lanes of the source do with pages they have claimed: send what has content, tell
what is zero.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from pyumem import wire
from pyumem.lanes.link import Link
from pyumem.ram import PAGE_SIZE, RamFile
from pyumem.stats import Counter, StatsBlock

if TYPE_CHECKING:
    from pyumem.lanes.compress import Packer

RUN_PAGES: Final = max(1, 256 * 1024 // PAGE_SIZE)
"""Longest run in one frame, in pages: short enough that an urgent page waits for little behind it.
"""


def make_packer(
    wish: dict[str, str] | None, stats: StatsBlock, *, live: bool = False
) -> Packer | None:
    """Return what compresses a lane's pages as its start message wishes, None if nothing does.
    live: the guest may write them meanwhile.  Raises UmemError.
    """
    if wish is None:
        return None
    # Costs a worker time and memory that not all need.
    from pyumem.lanes.compress import Packer
    from pyumem.lanes.payoff import Always, Payoff

    decision = Always() if wish["wish"] == "on" else Payoff()
    return Packer(wish["directory"], decision, stats, live=live)


class Sender:
    """Sends claimed pages on one lane."""

    def __init__(
        self,
        link: Link,
        ram: Sequence[RamFile],
        stats: StatsBlock,
        packer: Packer | None = None,
    ) -> None:
        """Send from these RAM blocks, in the order of HELLO; compressed, if the packer says so."""
        self._packer = packer
        self._link = link
        self._ram = ram
        self._stats = stats

    def send(self, area: int, pgoff: int, count: int) -> int:
        """Send a claimed range: a PAGES frame, or a PACKED one, for each stretch with content, one
        ZERO frame for the rest.  Returns the bytes of content that went.  Raises LinkError.
        """
        sent = 0
        ram = self._ram[area]
        zero: list[tuple[int, int]] = []
        for content, first, nr in ram.pieces(pgoff, count):
            if not content:
                zero.append((first, nr))
                continue
            for start in range(first, first + nr, RUN_PAGES):
                run = min(RUN_PAGES, first + nr - start)
                with ram.view(start, run) as view:
                    sent += self._send_run(area, start, run, view)
                self._stats.add(Counter.PAGES, run)
        self.zero(area, zero)
        return sent

    def send_runs(self, area: int, runs: Sequence[tuple[int, int]]) -> int:
        """Send claimed ranges of together at most RUN_PAGES: several that have content in one
        frame, since a frame costs more than a page, unless they are worth compressing.  Returns the
        bytes of content that went.  Raises LinkError.
        """
        if len(runs) == 1 or (self._packer and self._packer.decision.wants()):
            return sum(self.send(area, pgoff, count) for pgoff, count in runs)
        ram = self._ram[area]
        content: list[tuple[int, int]] = []
        zero: list[tuple[int, int]] = []
        for pgoff, count in runs:
            for has_content, first, nr in ram.pieces(pgoff, count):
                (content if has_content else zero).append((first, nr))
        pages = sum(nr for _, nr in content)
        for at in range(0, len(content), wire.MAX_SCATTERED_RANGES):
            self._send_scattered(area, content[at : at + wire.MAX_SCATTERED_RANGES])
        self._stats.add(Counter.PAGES, pages)
        if self._packer:
            self._packer.decision.sent(pages * PAGE_SIZE)
        self.zero(area, zero)
        return pages * PAGE_SIZE

    def _send_scattered(self, area: int, ranges: Sequence[tuple[int, int]]) -> None:
        with contextlib.ExitStack() as stack:
            ram = self._ram[area]
            views = [stack.enter_context(ram.view(first, nr)) for first, nr in ranges]
            self._link.send(wire.pack_scattered(area, ranges, PAGE_SIZE), *views)

    def _send_run(self, area: int, pgoff: int, count: int, view: memoryview) -> int:
        packed = self._packer.pack(view) if self._packer else None
        if packed is None:
            self._link.send(wire.pack_pages(area, pgoff, count, PAGE_SIZE), view)
        else:
            self._link.send(wire.pack_packed(area, pgoff, count, len(packed)), packed)
        if self._packer:
            self._packer.decision.sent(len(view))
        return len(view if packed is None else packed)

    def zero(self, area: int, ranges: Sequence[tuple[int, int]]) -> None:
        """Tell that ranges are zero.  Raises LinkError."""
        for at in range(0, len(ranges), wire.MAX_RANGES):
            part = ranges[at : at + wire.MAX_RANGES]
            self._link.send(wire.pack_ranges(area, part))
            self._stats.add(Counter.ZERO_PAGES, sum(count for _, count in part))
