# SPDX-License-Identifier: GPL-2.0-or-later
"""Decisions of the source's end that need no destination."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from pyumem.address import Address
from pyumem.errors import LinkError, UmemError
from pyumem.hello import Lane
from pyumem.report import State
from pyumem.source import Migration, Plan
from pyumem.stats import StatsBlock
from pyumem.workers import Worker


class Scene:
    """A migration with lanes whose processes were never started."""

    def __init__(self, *, background: bool) -> None:
        self.said: list[str] = []
        plan = Plan(Path("/qmp"), Address("h", 1), b"", background=background)
        self.migration = Migration(plan, self.said.append)
        self.broken = asyncio.get_running_loop().create_future()
        self.migration._broken = self.broken
        self.lanes = {}
        for lane in (Lane.URGENT, Lane.BACKGROUND):
            worker = Worker(lane.value, StatsBlock.create("test"), self.migration._worker_failed)
            self.lanes[lane] = self.migration._lanes[lane, 0] = worker

    def lose(self, lane: Lane) -> None:
        self.migration._worker_failed(self.lanes[lane], f"{lane}: lost")

    def close(self) -> None:
        for worker in self.lanes.values():
            worker.close()


def run(work: Callable[[Scene], Awaitable[None]], *, background: bool) -> None:
    async def main() -> None:
        scene = Scene(background=background)
        try:
            await work(scene)
        finally:
            scene.close()

    asyncio.run(main())


def test_a_background_lane_that_has_not_begun_may_be_lost() -> None:
    async def work(scene: Scene) -> None:
        scene.migration.state = State.POSTCOPY_ACTIVE
        scene.lose(Lane.BACKGROUND)
        assert not scene.broken.done()
        assert scene.said == ["background: lost; no page is lost with it"]
        with pytest.raises(UmemError, match="pages still come on request"):
            scene.migration.set_background(True)
        scene.lose(Lane.URGENT)
        assert isinstance(scene.broken.exception(), LinkError)

    run(work, background=False)


def test_a_background_lane_that_has_sent_all_may_be_lost() -> None:
    async def work(scene: Scene) -> None:
        scene.migration.state = State.POSTCOPY_ACTIVE
        scene.migration._go(Lane.BACKGROUND)
        scene.lanes[Lane.BACKGROUND].drained = True
        scene.lose(Lane.BACKGROUND)
        assert not scene.broken.done()

    run(work, background=True)


@pytest.mark.parametrize("state", [State.DEVICE, State.POSTCOPY_ACTIVE])
def test_another_lane_that_is_lost_breaks_the_migration(state: State) -> None:
    async def work(scene: Scene) -> None:
        scene.migration.state = state
        if state.committed:
            scene.migration._go(Lane.BACKGROUND)
        scene.lose(Lane.BACKGROUND)
        assert isinstance(scene.broken.exception(), LinkError)

    run(work, background=state.committed)
