# SPDX-License-Identifier: GPL-2.0-or-later
"""Which neighbours of a requested page are sent unasked: `--prefetch-forward`,
`--prefetch-backward`.

The window adapts: a request that continues where the last one of its area ended doubles it, another
one halves it.  So a guest that reads on gets long runs, and one that jumps about pays for little
that it does not want.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, Final

MAX_PAGES: Final = 4096
"""Largest window that can be asked for, in pages."""
_WIDEST: Final = 8
"""How many times the window that was asked for sequential access makes it."""
_WAITING: Final = 64
"""Ranges that wait to be sent; older ones are dropped, since the guest has gone on."""
PIECE_PAGES: Final = 16
"""Pages that are sent at a time: a request that comes meanwhile waits for so many."""


@dataclass(frozen=True, slots=True)
class Prefetch:
    """What was asked for, in pages; 0 is none."""

    forward: int = 0
    backward: int = 0

    def to_json(self) -> dict[str, int]:
        """Return the form of a start message."""
        return {"forward": self.forward, "backward": self.backward}

    @classmethod
    def from_json(cls, message: dict[str, Any]) -> Prefetch:
        """Take what to_json() gave."""
        return cls(forward=message["forward"], backward=message["backward"])

    def __bool__(self) -> bool:
        """Tell whether there is anything to do."""
        return bool(self.forward or self.backward)


NO_PREFETCH: Final = Prefetch()


class Window:
    """The adaptive window of one area of so many pages."""

    def __init__(self, wish: Prefetch, npages: int) -> None:
        """Begin with what was asked for."""
        self._wish = wish
        self._npages = npages
        self._scale = 1.0
        self._end = -1

    def around(self, pgoff: int, count: int) -> list[tuple[int, int]]:
        """Return the ranges (first page, count) to send after this request, the next ones first."""
        forward = self._scaled(self._wish.forward)
        # What was prefetched is not asked for: the next request comes from behind it.
        if self._end >= 0:
            near = self._end <= pgoff <= self._end + forward + self._wish.forward
            self._scale = min(self._scale * 2, _WIDEST) if near else self._scale / 2
            self._scale = max(self._scale, 1 / MAX_PAGES)
        self._end = pgoff + count
        ranges = []
        if ahead := min(self._scaled(self._wish.forward), self._npages - self._end):
            ranges.append((self._end, ahead))
        if behind := min(self._scaled(self._wish.backward), pgoff):
            ranges.append((pgoff - behind, behind))
        return ranges

    def _scaled(self, pages: int) -> int:
        return int(pages * self._scale)


class Ahead:
    """Ranges that wait to be sent, the newest request's first."""

    def __init__(self, wish: Prefetch, sizes: list[int]) -> None:
        """sizes: pages of each area."""
        self._windows = [Window(wish, npages) for npages in sizes] if wish else []
        self._waiting: deque[tuple[int, int, int]] = deque(maxlen=_WAITING)

    def __bool__(self) -> bool:
        """Tell whether something waits."""
        return bool(self._waiting)

    def requested(self, area: int, pgoff: int, count: int) -> None:
        """Note what was asked for and sent."""
        if self._windows:
            for first, nr in reversed(self._windows[area].around(pgoff, count)):
                self._waiting.appendleft((area, first, nr))

    def take(self) -> tuple[int, int, int]:
        """Return the next piece: area, first page, count."""
        area, first, count = self._waiting.popleft()
        if count > PIECE_PAGES:
            self._waiting.appendleft((area, first + PIECE_PAGES, count - PIECE_PAGES))
        return area, first, min(count, PIECE_PAGES)
