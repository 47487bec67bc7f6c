# SPDX-License-Identifier: GPL-2.0-or-later
"""Driving stock QEMU over QMP: what its RAM is, its migration states, and its end.

Nothing here knows umem's protocol.  QEMU needs no patch: RAM on shared files, and the capabilities

    x-ignore-shared           RAM on shared files stays out of the stream
    pause-before-switchover   the source stops and waits with all I/O drained, so that RAM is known
                              to be still before a page is read
    events                    each change of state is an event
    late-block-activate       the destination leaves its disks alone until `cont`, so that the
                              source
                              can still have them back
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import stat
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qemu.qmp import EventListener, ExecuteError, Message, QMPClient, QMPError
from qemu.qmp.protocol import Runstate

from pyumem.areafs import is_area_file
from pyumem.errors import CheckError, QemuError, UmemError
from pyumem.process import ProcessName

log = logging.getLogger(__name__)

IGNORE_SHARED: Final = "x-ignore-shared"
SOURCE_CAPABILITIES: Final = (IGNORE_SHARED, "pause-before-switchover", "events")
DESTINATION_CAPABILITIES: Final = (IGNORE_SHARED, "events", "late-block-activate")
UNLIMITED_BANDWIDTH: Final = 1 << 40
"""Bytes a second for the device state: our sockets are the limit."""
_STREAM: Final = "umem-device-state"
_ANNOUNCE: Final = {"initial": 50, "max": 550, "rounds": 5, "step": 100}
"""QEMU's own defaults, in milliseconds; it wants to be told them."""
_GREETING_S: Final = 5.0
_QUIT_S: Final = 5.0
_RETRY_S: Final = 0.02
_LAST_WORDS_S: Final = 1.0
_LATE_RETRY_S: Final = 1.0
_USE_LAUNCHER: Final = (
    "start the VM with `umem-qemu`, or give QEMU -object memory-backend-file,...,share=on"
)


def _what_file(status: os.stat_result) -> tuple[int, ...]:
    """Return what tells a file from all others: a device's number, else device and inode."""
    if stat.S_ISCHR(status.st_mode):
        return (status.st_rdev,)
    return (status.st_dev, status.st_ino)


@dataclass(frozen=True, slots=True)
class RamBlock:
    """A RAM block on a shared file.  size is bytes."""

    id: str
    path: str
    size: int


class _Client(QMPClient):
    """Makes no text of each message for a log that nobody reads: a fifth of what a command costs,
    and some are given while the VM stands still.
    """

    def _cb_outbound(self, msg: Message) -> Message:
        return msg

    def _cb_inbound(self, msg: Message) -> Message:
        return msg


class Qemu:
    """One QEMU process behind its QMP socket."""

    def __init__(
        self, client: QMPClient, path: Path, pid: int, pidfd: int, *, foreign: bool = False
    ) -> None:
        """Use connect()."""
        self.foreign: Final = foreign
        """It is another user's: it can be spoken to, and neither looked into nor signalled."""
        self._client = client
        self.path: Final = path
        self.pid: Final = pid
        self._pidfd = pidfd
        self._identified = False
        self._changed = asyncio.Condition()
        self._listener = EventListener()
        self._tasks: list[asyncio.Task[None]] = []
        self._problem = ""
        self.answers = asyncio.Event()
        """Set when it can be spoken to."""
        self.gone = asyncio.Event()
        """Set when its process has ended."""
        self.cut = asyncio.Event()
        """Set when the QMP connection ended, though QEMU may live on."""
        self.migration = "none"
        """The last migration state that QEMU told."""
        self.stopped_at: float | None = None
        """When it told that the VM stopped (time.monotonic())."""
        self.resumed = False
        """It told that the VM runs, since this was last set to False."""
        self.shutdown_reason = ""
        """Why it said that it shuts down, empty if it did not say so."""

    # --- connecting ---

    @classmethod
    async def connect(cls, path: Path) -> Qemu:
        """Connect and identify the process.

        Raises QemuError; CheckError when somebody else holds the socket.
        """
        client = _Client("umem")
        async with contextlib.AsyncExitStack() as stack:
            sock = stack.enter_context(
                socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            )
            sock.setblocking(False)
            try:
                await asyncio.get_running_loop().sock_connect(sock, str(path))
                # Of a listening socket the kernel tells who called listen().
                raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
                pid, uid, _ = struct.unpack("3i", raw)
                pidfd = os.pidfd_open(pid)
                stack.callback(os.close, pidfd)
                foreign = os.geteuid() not in (0, uid)
                qemu = cls(client, path, pid, pidfd, foreign=foreign)
                client.register_listener(qemu._listener)
                async with asyncio.timeout(_GREETING_S):
                    await client.connect(sock)
            except TimeoutError:
                raise CheckError(
                    f"QMP socket {path} does not greet: it serves one client at a time, close the "
                    "other"
                ) from None
            except OSError as e:
                raise QemuError(f"QMP socket {path}: {e.strerror or e}") from e
            except QMPError as e:
                raise QemuError(f"QMP socket {path}: {e}") from e
            stack.pop_all()  # both are the new object's
        qemu.answers.set()
        qemu._tasks = [
            asyncio.create_task(qemu._follow_events(), name=f"qmp events {path}"),
            asyncio.create_task(qemu._follow_end(), name=f"qmp end {path}"),
            asyncio.create_task(qemu._follow_process(), name=f"process {pid}"),
        ]
        return qemu

    @classmethod
    async def connect_when_there(cls, path: Path, seconds: float) -> Qemu:
        """Connect to a QEMU that is starting: try again for so many seconds.  Raises QemuError."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                return await cls.connect(path)
            except (QemuError, CheckError):
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(_RETRY_S)

    @classmethod
    def adopt(cls, path: Path, process: ProcessName) -> Qemu:
        """Know a QEMU that cannot be spoken to yet, perhaps since its main loop waits for a page
        that comes through us.  It is connected to as soon as it answers.

        Raises QemuError when it is gone.
        """
        pidfd = process.open()
        if pidfd is None:
            raise QemuError(f"QEMU (pid {process.pid}) is gone")
        qemu = cls(_Client("umem"), path, process.pid, pidfd)
        qemu._identified = True
        qemu._tasks = [
            asyncio.create_task(qemu._follow_process(), name=f"process {process.pid}"),
            asyncio.create_task(qemu._connect_late(), name=f"qmp {path}"),
        ]
        return qemu

    async def _follow_process(self) -> None:
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        pidfd = os.dup(self._pidfd)  # wait_exit() watches the other
        loop.add_reader(pidfd, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(pidfd)
            os.close(pidfd)
        if self.answers.is_set():
            # Its last words first: why the VM ended.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LAST_WORDS_S):
                    await self.cut.wait()
        self.gone.set()
        async with self._changed:
            self._changed.notify_all()

    async def _connect_late(self) -> None:
        while True:
            try:
                found = await Qemu.connect(self.path)
                break
            except UmemError as e:
                if str(e) != self._problem:
                    log.info("QEMU (pid %d): %s; tried again", self.pid, e)
                    self._problem = str(e)
                await asyncio.sleep(_LATE_RETRY_S)
        # Its connection becomes ours; what it knows of the process we know already.
        self._client, self._listener = found._client, found._listener
        found._forget()
        self.answers.set()
        await asyncio.gather(self._follow_events(), self._follow_end())

    def _forget(self) -> None:
        """Leave the connection to somebody else."""
        for task in self._tasks:
            task.cancel()
        self._tasks = []
        os.close(self._pidfd)
        self._pidfd = -1

    async def close(self) -> None:
        """Leave QEMU alone; again is harmless."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        with contextlib.suppress(Exception):  # why a connection ended does not matter any more
            await self._client.disconnect()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    # --- events ---

    async def _follow_events(self) -> None:
        async for event in self._listener:
            data = event.get("data")
            match event["event"]:
                case "MIGRATION" if isinstance(data, dict):
                    self.migration = str(data.get("status"))
                case "STOP":
                    self.stopped_at = time.monotonic()
                case "RESUME":
                    self.resumed = True
                case "SHUTDOWN" if isinstance(data, dict):
                    self.shutdown_reason = str(data.get("reason") or "shutdown")
            async with self._changed:
                self._changed.notify_all()

    async def _follow_end(self) -> None:
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()
        self.cut.set()
        async with self._changed:
            self._changed.notify_all()

    async def wait_unusable(self) -> None:
        """Wait until it is gone, or cannot be spoken to any more."""
        async with self._changed:
            while not (self.gone.is_set() or self.cut.is_set()):
                await self._changed.wait()

    async def wait_migration(self, *wanted: str) -> str:
        """Wait until the migration has one of these states.

        Raises QemuError when it fails instead, or QEMU ends.
        """
        async with self._changed:
            while self.migration not in wanted:
                if self.gone.is_set() or self.cut.is_set():
                    raise QemuError(f"QEMU (pid {self.pid}) is gone")
                if self.migration in ("failed", "cancelled", "cancelling"):
                    break
                await self._changed.wait()
            else:
                return self.migration
        raise QemuError(
            f"QEMU's migration ended as {self.migration}{await self._migration_error()}"
        )

    async def _migration_error(self) -> str:
        with contextlib.suppress(QemuError):
            answer = await self.execute("query-migrate")
            if isinstance(answer, dict) and "error-desc" in answer:
                return f": {answer['error-desc']}"
        return ""

    # --- commands ---

    async def execute(self, command: str, **arguments: object) -> Any:  # noqa: ANN401 (JSON)
        """Execute a command (underscores in argument names stand for dashes).

        Raises QemuError with QEMU's words.
        """
        named = {key.replace("_", "-"): value for key, value in arguments.items()}
        try:
            return await self._client.execute(command, named or None)
        except ExecuteError as e:
            raise QemuError(f"QEMU refused {command}: {e}") from e
        except QMPError as e:
            raise QemuError(f"QEMU (pid {self.pid}) is gone ({command}: {e})") from e

    async def status(self) -> str:
        """Return the run state: running, paused, inmigrate, postmigrate, ..."""
        answer = await self.execute("query-status")
        return str(answer["status"])

    async def version(self) -> str:
        """Return QEMU's version as text."""
        answer = await self.execute("query-version")
        number = answer["qemu"]
        return f"{number['major']}.{number['minor']}.{number['micro']}"

    async def name(self) -> str:
        """Return what -name says, empty without it."""
        answer = await self.execute("query-name")
        return str(answer.get("name", ""))

    async def announce(self) -> None:
        """Have the VM's network cards tell the switches where they are.  Best effort."""
        with contextlib.suppress(QemuError):
            await self.execute("announce-self", **_ANNOUNCE)

    async def migrate_into(self, sock: socket.socket) -> None:
        """Begin to migrate into a socket, of which QEMU gets a duplicate.

        Of a path it might not be allowed to connect to (-runas, a sandbox).  Raises QemuError.
        """
        try:
            self._client.send_fd_scm(sock.fileno())
        except (QMPError, OSError) as e:
            raise QemuError(f"QEMU (pid {self.pid}) does not take a socket: {e}") from e
        await self.execute("getfd", fdname=_STREAM)
        try:
            await self.execute("migrate", uri=f"fd:{_STREAM}")
        except QemuError:
            with contextlib.suppress(QemuError):
                await self.execute("closefd", fdname=_STREAM)
            raise

    async def capabilities(self) -> dict[str, bool]:
        """Return the migration capabilities and whether they are on."""
        answer = await self.execute("query-migrate-capabilities")
        return {str(one["capability"]): bool(one["state"]) for one in answer}

    async def set_capabilities(self, wanted: Mapping[str, bool]) -> None:
        """Switch capabilities.  Raises QemuError."""
        await self.execute(
            "migrate-set-capabilities",
            capabilities=[{"capability": name, "state": on} for name, on in wanted.items()],
        )

    async def require_capabilities(self, names: Sequence[str]) -> None:
        """Raise CheckError when this QEMU does not know one of them."""
        known = await self.capabilities()
        if missing := [name for name in names if name not in known]:
            raise CheckError(
                f"QEMU {await self.version()} does not know the migration capability "
                f"{', '.join(missing)}: use QEMU 4.2 or later"
            )

    # --- RAM ---

    async def ram_blocks(self) -> list[RamBlock]:
        """Return the VM's RAM, all of which must be on shared files.

        Raises CheckError that names the fix.
        """
        blocks = []
        for child in await self.execute("qom-list", path="/objects"):
            kind = str(child["type"]).removeprefix("child<").removesuffix(">")
            if not kind.startswith("memory-backend"):
                continue
            block_id = str(child["name"])
            if kind != "memory-backend-file":
                raise CheckError(f"RAM block {block_id} is a {kind}: {_USE_LAUNCHER}")
            where = f"/objects/{block_id}"
            if not await self.execute("qom-get", path=where, property="share"):
                raise CheckError(f"RAM block {block_id} is not shared: {_USE_LAUNCHER}")
            path = await self.execute("qom-get", path=where, property="mem-path")
            size = await self.execute("qom-get", path=where, property="size")
            blocks.append(RamBlock(block_id, str(path), int(size)))
        summary = await self.execute("query-memory-size-summary")
        total = int(summary["base-memory"]) + int(summary.get("plugged-memory", 0))
        # More than that is memory that the summary leaves out: an NVDIMM, a virtio-mem device.
        if (on_files := sum(block.size for block in blocks)) < total:
            raise CheckError(
                f"the VM has {total} bytes of RAM, {on_files} on shared files: {_USE_LAUNCHER}"
            )
        return sorted(blocks, key=lambda block: block.id)

    def identify(self, ram: Mapping[str, int]) -> None:
        """Check that the process has the VM's RAM; only then it is the VM, and may be signalled.

        ram has an open descriptor for each RAM block's name.  Whoever called listen() on the QMP
        socket may be a manager or a proxy instead, and a pid may have been used again.  Raises
        CheckError.
        """
        try:
            mapped, opened = self._mapped_files(), self._open_files()
        except OSError as e:
            raise CheckError(
                f"cannot see what QEMU (pid {self.pid}) has mapped: {e.strerror}; run as its user"
            ) from e
        for name, fd in ram.items():
            status = os.fstat(fd)
            # An area of the driver is mapped under another inode than that of its node or file.
            if stat.S_ISCHR(status.st_mode) or is_area_file(status):
                found = _what_file(status) in opened
            else:
                found = (status.st_dev, status.st_ino) in mapped
            if not found:
                raise CheckError(
                    f"RAM block {name}: process {self.pid}, which answers on {self.path}, does not "
                    "have its file mapped: the file was replaced, or that is not QEMU but a proxy"
                )
        self._identified = True

    def _mapped_files(self) -> set[tuple[int, int]]:
        """Return device and inode of each file that the process has mapped."""
        found = set()
        for line in Path(f"/proc/{self.pid}/maps").read_text(errors="replace").splitlines():
            fields = line.split(maxsplit=5)
            major, minor = (int(part, 16) for part in fields[3].split(":"))
            found.add((os.makedev(major, minor), int(fields[4])))
        return found

    def _open_files(self) -> set[tuple[int, ...]]:
        """Return which files and devices the process has open, see _what_file()."""
        found = set()
        for link in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                found.add(_what_file(link.stat()))
        return found

    # --- the end ---

    async def wait_exit(self, seconds: float) -> bool:
        """Wait so long for the process to end.  Tells whether it did."""
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(self._pidfd, ended.set)
        try:
            async with asyncio.timeout(seconds):
                await ended.wait()
        except TimeoutError:
            return False
        finally:
            loop.remove_reader(self._pidfd)
        return True

    def freeze(self) -> None:
        """Stop the process itself (SIGSTOP): nothing it is told can change the VM from here on.

        Raises QemuError.
        """
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on after freeze(); harmless without.  Raises QemuError."""
        self._signal(signal.SIGCONT)

    async def kill(self) -> bool:
        """End the process without asking it.  Tells whether it is gone."""
        with contextlib.suppress(QemuError):
            self._signal(signal.SIGKILL)
        return await self.wait_exit(_QUIT_S)

    def _signal(self, number: signal.Signals) -> None:
        if not self._identified:
            raise QemuError(f"process {self.pid} is not known to be QEMU: no {number.name} for it")
        try:
            signal.pidfd_send_signal(self._pidfd, number)
        except OSError as e:
            raise QemuError(f"QEMU (pid {self.pid}): {number.name}: {e.strerror}") from e

    async def end(self, patience: float = _QUIT_S) -> bool:
        """End the process: quit, and SIGKILL for one that does not hear within `patience` seconds.

        Tells whether it is gone.
        """
        with contextlib.suppress(QemuError, TimeoutError):
            async with asyncio.timeout(patience):
                await self.execute("quit")
        return await self.wait_exit(patience) or await self.kill()
