# SPDX-License-Identifier: GPL-2.0-or-later
"""The rounds of pre-copy, with areas, lanes and a guest that are played here."""

from __future__ import annotations

import array
import asyncio
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pyumem.convergence import Limits
from pyumem.errors import UmemError
from pyumem.hello import Lane
from pyumem.precopy import Precopy
from pyumem.ram import PAGE_SIZE
from pyumem.stats import Totals

SIZES = (100, 70)
ALL = (1 << 170) - 1


class FakeArea:
    """An area's log of writes."""

    def __init__(self, npages: int) -> None:
        self.npages = npages
        self.on = False
        self.written = 0

    def set_dirty_log(self, on: bool) -> None:
        self.on = on

    def dirty(self, *, clear: bool) -> tuple[array.array[int], int]:
        assert self.on
        words = array.array("Q", self.written.to_bytes(8 * -(-self.npages // 64), "little"))
        nr = self.written.bit_count()
        if clear:
            self.written = 0
        return words, nr


class FakeWorker:
    """A lane: at "go" it sends what is free, page after page, and the guest goes on meanwhile."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self._over: asyncio.Future[None] | None = None

    def next_round(self) -> asyncio.Future[None]:
        self._over = asyncio.get_running_loop().create_future()
        return self._over

    def command(self, word: str) -> None:
        self.scene.commands.append(word)
        if word == "go":
            self.scene.tasks.append(asyncio.create_task(self._round()))

    async def _round(self) -> None:
        scene = self.scene
        sent = 0
        while claimed := scene.precopy.claims.claim_runs(8):
            [(start, count)] = claimed
            sent |= ((1 << count) - 1) << start
            scene.there |= ((1 << count) - 1) << start
            scene.totals.pages += count
            scene.totals.bytes_sent += count * PAGE_SIZE
            await asyncio.sleep(scene.page_s)
        scene.rounds.append(sent)
        scene.guest(len(scene.rounds))
        assert self._over is not None
        self._over.set_result(None)


class Scene:
    def __init__(self, limits: Limits, guest: Callable[[Scene, int], None]) -> None:
        self.areas = [FakeArea(size) for size in SIZES]
        self.said: list[str] = []
        self.precopy = Precopy(cast("Any", self.areas), limits, self.said.append, "vm1")
        self._guest = guest
        self.commands: list[str] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.rounds: list[int] = []
        """What each sent."""
        self.there = 0
        self.totals = Totals()
        self.page_s = 0.0
        self.lanes = cast(
            "Any",
            SimpleNamespace(
                workers={(Lane.PRECOPY, 0): FakeWorker(self)},
                totals=lambda _lane: replace(self.totals),
            ),
        )

    def guest(self, number: int) -> None:
        self._guest(self, number)

    def write(self, *slots: int) -> None:
        """The guest writes to pages; they are stale where they were sent."""
        for slot in slots:
            area, page = (0, slot) if slot < 100 else (1, slot - 100)
            self.areas[area].written |= 1 << page
            self.there &= ~(1 << slot)

    def run(self) -> int:
        """Do the rounds, and return what is stale at the end."""

        async def main() -> int:
            await self.precopy.run(self.lanes)
            return await self.precopy.last_reading()

        try:
            return asyncio.run(asyncio.wait_for(main(), 30))
        finally:
            self.precopy.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("pyumem.precopy._SHORTEST_S", 0.001)
    yield


def pages(of: int) -> list[int]:
    return [slot for slot in range(170) if of >> slot & 1]


def test_what_is_written_is_sent_again_and_the_rest_is_stale() -> None:
    def guest(scene: Scene, number: int) -> None:
        if number == 1:
            scene.write(3, 99, 100, 169)
        elif number == 2:
            scene.write(4)

    scene = Scene(Limits(rounds=2, may_switch=True), guest)
    stale = scene.run()
    assert scene.rounds[0] == ALL and pages(scene.rounds[1]) == [3, 99, 100, 169]
    assert pages(stale) == [4] and not scene.precopy.finish_before_commit
    assert scene.there | stale == ALL, "what is not stale is there"
    first, second = scene.precopy.clean(stale)
    assert first[0] == 0b11101111 and len(first) == 13 and second == b"\xff" * 8 + b"\x3f"


def test_a_page_that_is_always_written_is_left_for_the_end() -> None:
    def guest(scene: Scene, number: int) -> None:
        scene.write(7, 20 + number)

    scene = Scene(Limits(rounds=6, may_switch=True), guest)
    stale = scene.run()
    assert sum(sent >> 7 & 1 for sent in scene.rounds) == 3, "the first ones had it"
    assert stale >> 7 & 1 and scene.there | stale == ALL
    assert scene.precopy.known.hot_pages == 1


def test_and_sent_when_it_has_cooled_down() -> None:
    def guest(scene: Scene, number: int) -> None:
        scene.write(*([7] if number < 4 else []), 20 + number)

    scene = Scene(Limits(rounds=7, may_switch=True), guest)
    stale = scene.run()
    assert not stale >> 7 & 1 and scene.there >> 7 & 1 and scene.there | stale == ALL


def test_it_finishes_when_little_is_left() -> None:
    scene = Scene(Limits(), lambda scene, number: scene.write(5) if number == 1 else None)
    stale = scene.run()
    assert len(scene.rounds) == 1 and scene.precopy.finish_before_commit
    assert pages(stale) == [5] and "within 300 ms" in scene.precopy.known.reason


def test_it_gives_up_and_says_why() -> None:
    scene = Scene(Limits(max_downtime_s=1e-9), lambda scene, _n: scene.write(*range(170)))
    with pytest.raises(UmemError, match=r"does not converge: .* KiB remain after round"):
        scene.run()


def test_a_forced_switch_ends_the_round() -> None:
    scene = Scene(Limits(), lambda _scene, _number: None)
    scene.page_s = 0.02

    async def main() -> int:
        running = asyncio.create_task(scene.precopy.run(scene.lanes))
        await asyncio.sleep(0.1)
        scene.write(0)
        scene.precopy.force_switch()
        await running
        return await scene.precopy.last_reading()

    stale = asyncio.run(asyncio.wait_for(main(), 30))
    assert 0 < stale.bit_count() < 170 and stale & 1
    assert scene.there | stale == ALL and not scene.precopy.finish_before_commit
    scene.precopy.close()


def test_the_time_is_kept_within_a_round() -> None:
    limits = Limits(max_precopy_s=0.2, may_switch=True, max_downtime_s=1e-9)
    scene = Scene(limits, lambda scene, _: scene.write(1))
    scene.page_s = 0.1

    async def main() -> float:
        began = time.monotonic()
        await scene.precopy.run(scene.lanes)
        return time.monotonic() - began

    took = asyncio.run(main())
    stale = asyncio.run(scene.precopy.last_reading())
    scene.precopy.close()
    assert took < 1.0
    # What was not sent is for post-copy.
    sent = functools.reduce(int.__or__, scene.rounds)
    assert stale | sent == (1 << scene.precopy._slots.total) - 1


def test_the_rest_is_sent_without_a_nap(monkeypatch: pytest.MonkeyPatch) -> None:
    """The VM stands still then."""
    monkeypatch.setattr("pyumem.precopy._SHORTEST_S", 0.05)
    scene = Scene(Limits(), lambda _scene, _number: None)

    async def main() -> float:
        await scene.precopy.run(scene.lanes)
        rest = await scene.precopy.last_reading()
        began = time.monotonic()
        await scene.precopy.send_rest(scene.lanes, rest)
        return time.monotonic() - began

    took = asyncio.run(main())
    scene.precopy.close()
    assert took < 0.03
