# SPDX-License-Identifier: GPL-2.0-or-later
"""A QMP monitor of our own on a QEMU, beside whoever else speaks to it: events with the time of
their arrival, so that both sides of every contender are watched by the same eyes.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from qemu.qmp import QMPClient, QMPError

T = TypeVar("T")
_CONNECT_S = 60.0


@dataclass(frozen=True)
class Event:
    """One event of QEMU's."""

    time: float
    """time.monotonic() seconds."""
    name: str
    data: dict[str, Any]


class Monitor:
    """A context manager; its loop runs in a thread, its methods block."""

    def __init__(self, path: Path) -> None:
        """Watch the QEMU that makes a QMP socket at this path, soon."""
        self._path = path
        self._client = QMPClient("bench")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._follower: asyncio.Task[None] | None = None
        self.events: list[Event] = []
        self._changed = threading.Condition()

    def __enter__(self) -> Monitor:
        """Connect.  Raises OSError, QMPError."""
        self._thread.start()
        try:
            self._do(self._connect(), _CONNECT_S + 10)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Disconnect."""
        with contextlib.suppress(Exception):
            self._do(self._close(), 5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)

    def _do(self, what: Coroutine[Any, Any, T], seconds: float) -> T:
        return asyncio.run_coroutine_threadsafe(what, self._loop).result(seconds)

    async def _connect(self) -> None:
        deadline = time.monotonic() + _CONNECT_S
        while True:
            try:
                await self._client.connect(str(self._path))
                break
            except (OSError, QMPError):
                if time.monotonic() > deadline:
                    raise
                self._client = QMPClient("bench")
                await asyncio.sleep(0.05)
        self._follower = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        with self._client.listener() as listener:
            async for message in listener:
                data = message.get("data")
                known = data if isinstance(data, dict) else {}
                event = Event(time.monotonic(), str(message["event"]), known)
                with self._changed:
                    self.events.append(event)
                    self._changed.notify_all()

    async def _close(self) -> None:
        if self._follower is not None:
            self._follower.cancel()
        await self._client.disconnect()

    def execute(self, command: str, seconds: float = 60.0, **arguments: object) -> Any:  # noqa: ANN401 - QMP's own
        """Execute a command.  Raises QMPError, TimeoutError."""
        return self._do(self._client.execute(command, arguments or None), seconds)

    def when(self, name: str, **data: object) -> float | None:
        """Return when the last event of that name and data came, None if none did."""
        for event in reversed(list(self.events)):
            if event.name == name and all(event.data.get(k) == v for k, v in data.items()):
                return event.time
        return None

    def wait(self, name: str, seconds: float, **data: object) -> float:
        """Wait for such an event, which may have come already.  Raises TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.when(name, **data) is not None, seconds):
                raise TimeoutError(f"no {name} {data or ''} within {seconds:.0f} s")
        found = self.when(name, **data)
        assert found is not None
        return found
