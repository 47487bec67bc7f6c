# SPDX-License-Identifier: GPL-2.0-or-later
"""Which neighbours of a requested page are sent unasked: `--prefetch-forward`,
`--prefetch-backward`.

The window adapts, in each direction by itself: a request that continues where the last one of its
area ended, or that ends where it began, doubles it, another one halves it.  So a guest that reads
on, or backwards, gets long runs, and one that jumps about pays for little that it does not want.
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
        self._forward = self._backward = 1.0
        self._start = self._end = -1

    def around(self, pgoff: int, count: int) -> list[tuple[int, int]]:
        """Return the ranges (first page, count) to send after this request, the next ones first."""
        wish = self._wish
        # What was prefetched is not asked for: the next request comes from behind it.
        if self._end >= 0:
            reach = int(wish.forward * self._forward) + wish.forward
            self._forward = _adapt(self._forward, near=0 <= pgoff - self._end <= reach)
            reach = int(wish.backward * self._backward) + wish.backward
            self._backward = _adapt(
                self._backward, near=0 <= self._start - (pgoff + count) <= reach
            )
        self._start, self._end = pgoff, pgoff + count
        ranges = []
        if ahead := min(int(wish.forward * self._forward), self._npages - self._end):
            ranges.append((self._end, ahead))
        if behind := min(int(wish.backward * self._backward), pgoff):
            ranges.append((pgoff - behind, behind))
        return ranges


def _adapt(scale: float, *, near: bool) -> float:
    return min(scale * 2, _WIDEST) if near else max(scale / 2, 1 / MAX_PAGES)


class Ahead:
    """Ranges that wait to be sent, the newest request's first."""

    def __init__(self, wish: Prefetch, sizes: list[int]) -> None:
        """sizes: pages of each area."""
        self._windows = [Window(wish, npages) for npages in sizes] if wish else []
        self._waiting: deque[tuple[int, int, int, bool]] = deque(maxlen=_WAITING)

    def __bool__(self) -> bool:
        """Tell whether something waits."""
        return bool(self._waiting)

    def requested(self, area: int, pgoff: int, count: int) -> None:
        """Note what was asked for and sent."""
        if self._windows:
            for first, nr in reversed(self._windows[area].around(pgoff, count)):
                self._waiting.appendleft((area, first, nr, first < pgoff))

    def take(self) -> tuple[int, int, int]:
        """Return the next piece: area, first page, count; the nearest to the request first."""
        area, first, count, before = self._waiting.popleft()
        piece = min(count, PIECE_PAGES)
        if rest := count - piece:
            self._waiting.appendleft((area, first if before else first + piece, rest, before))
        return area, first + rest if before else first, piece
