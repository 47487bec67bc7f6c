# SPDX-License-Identifier: GPL-2.0-or-later
"""What sources that come back have to be told of VMs that are not here any more, or never were.

A source whose connection broke at the wrong moment knows neither that its VM has all its memory nor
that COMMIT never arrived.  It comes back until it is told.  So a verdict is kept for a day, on
disk, since this daemon may be the one that dies; and for an hour its port is listened on for that
alone, until another VM is expected on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from pyumem import runtime
from pyumem.address import Address, listen, name_of, parse
from pyumem.errors import UmemError
from pyumem.greeting import AsyncLink, admit, refuse, welcome
from pyumem.hello import Hello
from pyumem.lanes.link import tune
from pyumem.recovery import Fate, Verdict
from pyumem.strangers import Strangers
from pyumem.tls import Security
from pyumem.wire import Kind

log = logging.getLogger(__name__)

KEEP_S: Final = 24 * 3600.0
LISTEN_S: Final = 3600.0


@dataclass(frozen=True, slots=True)
class Judged:
    """A VM of which a source may ask."""

    session: str
    name: str
    listen: str
    at: float
    """When it was judged, seconds since the epoch."""
    fate: Fate
    reason: str

    @property
    def verdict(self) -> Verdict:
        """Return what the source is told."""
        return Verdict(self.fate, self.reason)

    @property
    def recent(self) -> bool:
        """Tell whether its source may be on its way."""
        return time.time() - self.at < LISTEN_S

    @property
    def address(self) -> Address:
        """Return where its source comes to.  Raises UsageError."""
        return parse(self.listen, listening=True)

    @classmethod
    def from_json(cls, known: dict[str, Any]) -> Judged:
        """Read the JSON form.  Raises ValueError, TypeError, KeyError."""
        return cls(**{**known, "fate": Fate(known["fate"])})


def directory() -> Path:
    """Return where they are kept."""
    return runtime.runtime_dir() / "verdicts"


class Verdicts:
    """All of this host's."""

    def __init__(self) -> None:
        """Know none yet."""
        self._known: dict[str, Judged] = {}

    def load(self) -> list[Judged]:
        """Read what other daemons left, and return it."""
        for path in sorted(directory().glob("*.json")):
            try:
                judged = Judged.from_json(json.loads(path.read_text()))
            except (OSError, ValueError, TypeError, KeyError) as e:
                log.error("%s cannot be read: %s", path, e)
                continue
            if time.time() - judged.at > KEEP_S:
                path.unlink(missing_ok=True)
            else:
                self._known[judged.session] = judged
        return list(self._known.values())

    def judge(self, judged: Judged) -> bool:
        """Keep one.  What cannot be written is known to this process all the same.

        Tells whether it was written.
        """
        self._forget_old()
        self._known[judged.session] = judged
        try:
            runtime.make_private(directory())
            runtime.write_record(directory() / f"{judged.session}.json", asdict(judged))
            return True
        except (UmemError, OSError) as e:
            log.error("%s: %s", judged.name, e)
            return False

    def _forget_old(self) -> None:
        for session, judged in list(self._known.items()):
            if time.time() - judged.at > KEEP_S:
                del self._known[session]
                with contextlib.suppress(OSError):
                    (directory() / f"{session}.json").unlink(missing_ok=True)

    @property
    def addresses(self) -> set[Address]:
        """Return where sources that have to be told something may come to."""
        found = set()
        for judged in self._known.values():
            if judged.recent:
                with contextlib.suppress(UmemError):
                    found.add(judged.address)
        return found

    def of(self, session: str) -> Verdict | None:
        """Return what is known of a session."""
        judged = self._known.get(session)
        return judged.verdict if judged else None

    async def tell(self, hello: Hello, link: AsyncLink, token: bytes) -> bool:
        """Tell a source that resumes what became of its VM.  False when that is not known here.

        Raises LinkError.
        """
        verdict = self.of(hello.session)
        if verdict is None:
            return False
        await welcome(link, token, hello)
        await link.send_json(Kind.VERDICT, verdict.to_json())
        log.info("%s of session %s was told: %s", link.peer, hello.session, verdict.fate)
        return True


async def stay_for(address: Address, verdicts: Verdicts, security: Security) -> None:
    """Listen on a port for sources that come back, and for nobody else, for LISTEN_S.

    A port that cannot be had is somebody else's by now: that ends it.
    """
    try:
        sockets = listen(address)
    except UmemError as e:
        log.info("%s: not listened on for sources that come back: %s", address, e)
        return
    strangers = Strangers()
    try:
        async with asyncio.timeout(LISTEN_S), asyncio.TaskGroup() as group:
            for sock in sockets:
                group.create_task(_accept(sock, verdicts, security, strangers, group))
    except TimeoutError:
        pass
    finally:
        for sock in sockets:
            sock.close()


async def _accept(
    listener: socket.socket,
    verdicts: Verdicts,
    security: Security,
    strangers: Strangers,
    group: asyncio.TaskGroup,
) -> None:
    loop = asyncio.get_running_loop()
    while True:
        try:
            sock, at = await loop.sock_accept(listener)
        except OSError as e:
            log.warning("accept: %s", e.strerror)
            await asyncio.sleep(1)
            continue
        tune(sock)
        link = AsyncLink(sock, name_of(at))
        strangers.add(link, str(at[0]))
        task = group.create_task(_answer(link, verdicts, security))
        task.add_done_callback(lambda _, link=link: strangers.remove(link))  # type: ignore[misc]


async def _answer(link: AsyncLink, verdicts: Verdicts, security: Security) -> None:
    with contextlib.closing(link):
        try:
            hello = await admit(link, security)
            if not hello.resume or not await verdicts.tell(hello, link, security.token):
                await refuse(link, "no VM is expected here")
        except UmemError as e:
            log.warning("connection refused: %s", e)
