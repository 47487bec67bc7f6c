# SPDX-License-Identifier: GPL-2.0-or-later
"""The sockets through which the commands of this host talk to its daemons: one JSON object a line,
answer for question.

A question is {"command": NAME, ...}; an answer {"ok": true, ...} or {"ok": false, "error": TEXT}.
An asker that stays may be told more later: {"event": NAME, ...}.  A question is answered from
memory: no handler waits for the network or touches guest memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from pyumem.errors import ControlError, UmemError

MAX_LINE: Final = 256 * 1024

# Since 3.13 asyncio removes the path by itself, whoever made it.
_KEEP_PATH: Final[dict[str, Any]] = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}


class Asker:
    """Whoever asked, as a handler may keep it."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        """Speak on this connection, which stays the server's."""
        self._writer = writer
        self.gone: Final = asyncio.Event()
        """Set when the connection is closed, by whichever side."""

    def tell(self, event: str, **more: object) -> None:
        """Tell something unasked, at once.  One that is gone is no error."""
        self._writer.write(_line({"event": event, **more}))

    def dismiss(self) -> None:
        """Close the connection, after what was told."""
        self._writer.close()


Handler = Callable[[dict[str, Any], Asker], Awaitable[dict[str, Any]]]
"""Answers one question."""


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


class ControlServer:
    """Listens on a Unix socket, mode 0600, or on one that somebody else made and keeps.

    A context manager; whoever makes one holds a lock that says the path is its own.
    """

    def __init__(
        self, path: Path, handler: Handler, inherited: socket.socket | None = None
    ) -> None:
        """Name the socket's path; a socket that was left there is removed.

        One that is inherited listens at that path already and is owned from now on; the path is not
        ours then.
        """
        self._path = path
        self._handler = handler
        self._inherited = inherited
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        """Listen."""
        sock = self._inherited or socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            if not self._inherited:
                self._bind(sock)
            self._server = await asyncio.start_unix_server(
                self._serve, sock=sock, limit=MAX_LINE, **_KEEP_PATH
            )
        except OSError as e:
            sock.close()
            raise ControlError(f"{self._path}: {e.strerror}") from e
        return self

    def _bind(self, sock: socket.socket) -> None:
        self._path.unlink(missing_ok=True)
        mask = os.umask(0o177)
        try:
            sock.bind(str(self._path))
        finally:
            os.umask(mask)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close every connection and remove the socket."""
        assert self._server is not None
        self._server.close()
        for task in list(self._open):
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)
        if not self._inherited:
            self._path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.set_name(f"control {self._path.name}")
        self._open.add(task)
        asker = Asker(writer)
        try:
            while line := await reader.readline():
                writer.write(_line(await self._answer(line, asker)))
                await writer.drain()
        except (OSError, ValueError, asyncio.CancelledError):
            pass  # a line that is too long, a client that left, or our own end
        finally:
            asker.gone.set()
            self._open.discard(task)
            writer.close()
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await writer.wait_closed()

    async def _answer(self, line: bytes, asker: Asker) -> dict[str, Any]:
        try:
            question = json.loads(line)
            if not isinstance(question, dict) or not isinstance(question.get("command"), str):
                raise ControlError("a question is a JSON object with a 'command'")
            return {"ok": True, **await self._handler(question, asker)}
        except (UmemError, ValueError) as e:
            return {"ok": False, "error": str(e), "exit_status": getattr(e, "exit_status", 1)}


class ControlClient:
    """Asks a daemon, blocking.

    A context manager.  The connection may stay open to show that the asker lives.
    """

    def __init__(self, path: Path, *, timeout: float = 10.0) -> None:
        """Connect.  timeout is in seconds and bounds each answer.  Raises ControlError."""
        self._path = path
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._sock.settimeout(timeout)
        try:
            self._sock.connect(str(path))
        except OSError as e:
            self._sock.close()
            raise ControlError(f"{path}: {e.strerror or e}") from e
        self._file = self._sock.makefile("rb")

    def ask(self, command: str, **more: object) -> dict[str, Any]:
        """Ask and return the answer.

        Raises ControlError, with the daemon's words when it said no.
        """
        try:
            self._sock.sendall(_line({"command": command, **more}))
        except OSError as e:
            raise ControlError(f"{self._path}: {e}") from e
        answer = self.listen()
        if not answer.get("ok"):
            raise ControlError(str(answer.get("error")))
        return answer

    def listen(self) -> dict[str, Any]:
        """Return what the daemon says next.  Raises ControlError, also when it is gone."""
        try:
            line = self._file.readline(MAX_LINE)
            said = json.loads(line) if line else None
        except (OSError, ValueError) as e:
            raise ControlError(f"{self._path}: {e}") from e
        if not isinstance(said, dict):
            raise ControlError(f"{self._path}: the daemon closed the connection")
        return said

    def fileno(self) -> int:
        """Return the descriptor to poll: readable means a word, or that the daemon is gone."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close the connection; again is harmless."""
        self._file.close()
        self._sock.close()

    def __enter__(self) -> Self:
        """Leave the rest to __exit__()."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()
