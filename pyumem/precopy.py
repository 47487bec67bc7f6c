# SPDX-License-Identifier: GPL-2.0-or-later
"""The rounds of pre-copy, at the source.

    log on        the driver notes what the guest writes
    round 1       every page
    round n       what was written since the round before began
    ...           until it converges, does not, or somebody says so (pyumem.convergence)
    VM stops
    last reading  what is still to be sent: now, or, after the switch, by post-copy

A page that was written in each of the last rounds will be written in the next one too, and is left
for the end.  Sets of pages are Python's whole numbers, a bit a page: they are joined and counted as
fast as memory goes.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from pyumem.area import Area
from pyumem.claims import ClaimMap, Slots
from pyumem.convergence import Convergence, Decision, Limits, Round, Verdict
from pyumem.errors import UmemError
from pyumem.hello import Lane
from pyumem.ram import PAGE_SIZE
from pyumem.source_lanes import Lanes

_SHORTEST_S: Final = 0.05
_HOT_ROUNDS: Final = 3
"""Rounds in each of which a hot page was written."""


@dataclass(slots=True)
class Rounds:
    """What is known of them, for status and report."""

    number: int = 0
    remaining_pages: int = 0
    hot_pages: int = 0
    pages_per_s: float = 0.0
    downtime_s: float | None = None
    reason: str = ""
    """Why they ended."""
    history: list[Round] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return what status shows."""
        return {
            "round": self.number,
            "remaining_bytes": self.remaining_pages * PAGE_SIZE,
            "hot_bytes": self.hot_pages * PAGE_SIZE,
            "bandwidth_bytes_s": round(self.pages_per_s * PAGE_SIZE),
            "predicted_downtime_ms": None
            if self.downtime_s is None or self.downtime_s == float("inf")
            else round(1000 * self.downtime_s, 1),
            "reason": self.reason,
        }


class Precopy:
    """The rounds of one migration.  The log is the areas', and ends with their server."""

    def __init__(
        self, areas: Sequence[Area], limits: Limits, tell: Callable[[str], None], vm: str
    ) -> None:
        """Rounds over these areas, of which the driver's log is not on yet."""
        self._areas = areas
        self._limits = limits
        self._tell = tell
        self._vm = vm
        self._slots = Slots([area.npages for area in areas])
        self.claims = ClaimMap.create(self._slots)
        self.known = Rounds()
        self._forced = asyncio.Event()
        self.finish_before_commit = False
        """What remains is sent before the VM runs elsewhere."""
        self._written: list[int] = []
        """What the last readings of the log said, the latest last."""
        self._left = 0
        """Pages that were left for the end."""

    def force_switch(self) -> None:
        """End the rounds now, and post-copy the rest."""
        self._forced.set()

    # --- sets of pages ---

    async def _read_log(self, *, clear: bool) -> int:
        """Return what was written since it was last cleared."""
        found = 0
        for index, area in enumerate(self._areas):
            words, _ = await asyncio.to_thread(area.dirty, clear=clear)
            if sys.byteorder == "big":
                words = words[:]
                words.byteswap()
            # A granule of a source's area is a page: it is made by the launcher.
            found |= int.from_bytes(words.tobytes(), "little") << self._slots.bases[index]
        return found

    def _offer(self, pages: int) -> None:
        """Have the lanes claim these pages and no other."""
        taken = ~pages & ((1 << self._slots.total) - 1)
        data = taken.to_bytes(-(-self._slots.total // 8), "little")
        self.claims.know(0, self._slots.total, data)
        self.claims.cursor = 0

    # --- the rounds ---

    async def run(self, lanes: Lanes) -> None:
        """Do them until they are over.

        Raises UmemError when that is for the VM to stay.
        """
        for area in self._areas:
            await asyncio.to_thread(area.set_dirty_log, True)
        convergence = Convergence(self._limits)
        begun = time.monotonic()
        pages = (1 << self._slots.total) - 1
        while True:
            self.known.number += 1
            left_s = None
            if (longest := self._limits.max_precopy_s) is not None:
                left_s = max(0.0, longest - (time.monotonic() - begun))
            unsent = await self._round(lanes, pages, left_s)
            self._left |= unsent
            # What is left for the end costs no time: no reason to look at the log all the time.
            await asyncio.sleep(max(0.0, _SHORTEST_S - self.known.history[-1].seconds))
            found = await self._read_log(clear=False)
            self._note((found | self._left).bit_count())
            if self._forced.is_set():
                self.known.reason = "somebody wanted the switch"
                return
            decision = convergence.judge(self.known.history[-1], time.monotonic() - begun)
            self._know(convergence, decision)
            match decision.verdict:
                case Verdict.GIVE_UP:
                    raise UmemError(f"pre-copy does not converge: {decision.reason}")
                case Verdict.FINISH | Verdict.SWITCH:
                    self.finish_before_commit = decision.verdict is Verdict.FINISH
                    return
            pages = self._without_hot(await self._read_log(clear=True))

    async def _round(self, lanes: Lanes, pages: int, longest_s: float | None = None) -> int:
        """Send these pages.  Returns those that were not, since somebody forced the switch, or it
        took too long.
        """
        workers = [w for (lane, _), w in lanes.workers.items() if lane is Lane.PRECOPY]
        before, started = lanes.totals(Lane.PRECOPY), time.monotonic()
        self._offer(pages)
        waits = [worker.next_round() for worker in workers]
        for worker in workers:
            worker.command("go")
        done = asyncio.gather(*waits)
        forced = asyncio.create_task(self._forced.wait(), name=f"{self._vm}: forced switch")
        try:
            waiting: set[asyncio.Future[Any]] = {done, forced}
            await asyncio.wait(waiting, timeout=longest_s, return_when=asyncio.FIRST_COMPLETED)
            unsent = self.claims.take_free()
            await done
        finally:
            forced.cancel()
            done.cancel()
            await asyncio.gather(done, forced, return_exceptions=True)
        now = lanes.totals(Lane.PRECOPY)
        sent = now.pages + now.zero_pages - before.pages - before.zero_pages
        self.known.history.append(
            Round(sent, now.bytes_sent - before.bytes_sent, time.monotonic() - started, 0)
        )
        return unsent

    def _note(self, remaining: int) -> None:
        self.known.history[-1] = replace(self.known.history[-1], remaining_pages=remaining)
        self.known.remaining_pages = remaining

    def _know(self, convergence: Convergence, decision: Decision) -> None:
        self.known.pages_per_s = convergence.pages_per_s
        self.known.downtime_s = decision.downtime_s
        self.known.hot_pages = self._left.bit_count()
        self.known.reason = decision.reason
        self._tell(f"{self._vm}: pre-copy: {decision.reason}: {decision.verdict}")

    def _without_hot(self, written: int) -> int:
        """Return what is worth sending now of what was written; remember the rest."""
        self._written = [*self._written[-(_HOT_ROUNDS - 1) :], written]
        hot = written if len(self._written) == _HOT_ROUNDS else 0
        for earlier in self._written:
            hot &= earlier
        # What was left and has cooled down is sent now.
        worth = (written | self._left) & ~hot
        self._left = hot
        return worth

    # --- the end ---

    async def last_reading(self) -> int:
        """Return what the destination lacks, or has in an old state.  The VM stands still."""
        return await self._read_log(clear=True) | self._left

    async def send_rest(self, lanes: Lanes, pages: int) -> None:
        """Send it on the pre-copy lanes, while the VM stands still."""
        self._forced.clear()
        await self._round(lanes, pages)

    def end_lanes(self, lanes: Lanes) -> None:
        """Have every lane say END."""
        for (lane, _), worker in lanes.workers.items():
            if lane is Lane.PRECOPY:
                worker.command("end")

    def clean(self, stale: int) -> list[bytes]:
        """Return a bitmap for each area of what is not stale."""
        found = []
        for index, area in enumerate(self._areas):
            bits = ~(stale >> self._slots.bases[index]) & ((1 << area.npages) - 1)
            found.append(bits.to_bytes(-(-area.npages // 8), "little"))
        return found

    def report(self) -> dict[str, Any]:
        """Return what the report of the migration has of them."""
        known = self.known
        return {
            **known.to_json(),
            "rounds": [asdict(one) for one in known.history],
            "sent_pages": sum(one.sent_pages for one in known.history),
            "sent_bytes": sum(one.sent_bytes for one in known.history),
        }

    def close(self) -> None:
        """Unmap the claims; again is harmless."""
        self.claims.close()
