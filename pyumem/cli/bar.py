# SPDX-License-Identifier: GPL-2.0-or-later
"""How a migration looks on a terminal: a bar, by rich."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from pyumem.cli.common import plain, size
from pyumem.cli.display import Rate, Watched
from pyumem.report import Progress as Snapshot


class BarDisplay:
    """A bar, for terminals."""

    def __init__(self) -> None:
        """Draw on standard error."""
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>5.1f} %"),
            TextColumn("{task.fields[what]}", markup=False),
            console=Console(stderr=True),
            transient=True,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        """Begin to draw."""
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the terminal as it was."""
        self._bar.stop()

    def tell(self, text: str) -> None:
        """Print a line above the bar."""
        self._bar.console.print(f"umemctl: {plain(text)}", highlight=False, markup=False)

    def fail(self, text: str) -> None:
        """Print why it failed, above the bar."""
        self.tell(text)

    async def follow(self, watched: Watched) -> None:
        """Draw until cancelled."""
        rate = Rate()
        while True:
            now = watched.progress()
            rate.see(now)
            if now.pages_total:
                self._draw(now, rate)
            await asyncio.sleep(0.2)

    def _draw(self, now: Snapshot, rate: Rate) -> None:
        if self._task is None:
            self._task = self._bar.add_task(now.state, total=now.pages_total, what="")
        eta = rate.eta_s(now)
        what = (
            f"demand {now.pages_demand}  background {now.pages_background}  zero {now.pages_zero}  "
            f"{size(now.bytes_moved)}  {size(rate.bytes)}/s  "
            f"ETA {f'{eta:.0f} s' if eta is not None else '-'}"
        )
        self._bar.update(
            self._task, completed=now.pages_done, description=now.state.value, what=what
        )
