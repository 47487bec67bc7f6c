# SPDX-License-Identifier: GPL-2.0-or-later
"""The inner guest as a test sees it: its QEMU arguments and its serial line.

    spec = GuestSpec(workload="verify", writers=2, mb=64, memory="128M", vcpus=2)
    argv = [qemu, *spec.qemu_args(serial_socket)]
    with GuestConsole(serial_socket) as console:
        console.wait("ready", timeout=60)
        assert console.verdict().ok

The protocol is that of tests/guest/workload.c: lines that begin with
"UMEM-GUEST ", a kind, then words and key=value pairs.  Times are
time.monotonic() of the reader, so that lines of two consoles can be compared
across a migration.
"""

import contextlib
import itertools
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

PREFIX = "UMEM-GUEST "


class GuestError(Exception):
    """The guest did not say in time what it had to, or said that it failed."""


@dataclass(frozen=True)
class GuestSpec:
    """Which guest to boot."""

    workload: str = "verify"
    """verify, ab or idle."""
    writers: int = 1
    mb: int = 64
    """MiB that the workload owns."""
    memory: str = "128M"
    vcpus: int = 1
    accel: str = "kvm"
    """kvm or tcg."""
    virtio: bool = False
    """Load the guest's drivers of the balloon and of virtio-mem; pages are not zeroed when they are
    allocated, or the balloon would touch each page before it gives it back.
    """
    extra: tuple[str, ...] = ()
    """More QEMU arguments."""

    @property
    def boot_timeout(self) -> float:
        """Seconds after which a guest that is not `ready` never will be.

        TCG inside an emulated machine is emulation twice over: 40 s when the
        host has nothing else to do, minutes when it has.
        """
        return 300.0 if self.accel == "tcg" else 90.0

    def command_line(self) -> str:
        """Return the guest's kernel command line."""
        return (
            "console=ttyS0 quiet loglevel=1 panic=-1 no_timer_check tsc=reliable "
            "nokaslr mitigations=off audit=0 "
            f"umem.workload={self.workload} umem.writers={self.writers} umem.mb={self.mb}"
            + (" umem.virtio=1 memhp_default_state=online init_on_alloc=0" if self.virtio else "")
        )

    def qemu_args(self, serial: Path) -> list[str]:
        """Return QEMU's arguments, the program itself not among them.

        The serial line becomes a listening unix socket at SERIAL.
        """
        return [
            *("-accel", self.accel, "-cpu", "max" if self.accel == "tcg" else "host"),
            *("-m", self.memory, "-smp", str(self.vcpus)),
            *("-nodefaults", "-vga", "none", "-display", "none", "-no-reboot"),
            *("-kernel", os.environ["UMEM_GUEST_KERNEL"]),
            *("-initrd", os.environ["UMEM_GUEST_INITRD"]),
            *("-append", self.command_line()),
            *("-serial", f"unix:{serial},server=on,wait=off"),
            *self.extra,
        ]


@dataclass(frozen=True)
class Message:
    """One line of the guest."""

    time: float
    """When it was read, time.monotonic() seconds."""
    kind: str
    words: tuple[str, ...]
    fields: dict[str, str]
    text: str

    @classmethod
    def parse(cls, now: float, line: str) -> "Message | None":
        """Return the message in a line, None when it is none."""
        # The kernel's own output may stand before it on the same line.
        start = line.find(PREFIX)
        if start < 0:
            return None
        kind, *rest = line[start + len(PREFIX) :].split() or [""]
        pairs = [word.split("=", 1) for word in rest if "=" in word]
        words = tuple(word for word in rest if "=" not in word)
        return cls(now, kind, words, dict(pairs), line)


@dataclass(frozen=True)
class Verdict:
    """What the guest says of its own memory."""

    ok: bool
    rounds: int
    pages: int
    bad: int
    """Bad pages seen in its whole life."""
    text: str


@dataclass
class GuestConsole:
    """The other end of a guest's serial line; a context manager.

    A thread connects to QEMU's socket as soon as it is there and collects the
    lines; the methods may be called before that.
    """

    path: Path
    on_line: Callable[[str], None] | None = None
    """Called with each line, messages and others, in the reader's thread."""
    messages: list[Message] = field(default_factory=list)
    other_lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._changed = threading.Condition()
        self._socket: socket.socket | None = None
        self._closing = False
        self._ended = False
        self._thread = threading.Thread(target=self._read, name=f"console {self.path}")
        self._thread.daemon = True

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._closing = True
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(timeout=5)
        if self._socket is not None:
            self._socket.close()

    def _connect(self) -> socket.socket | None:
        while not self._closing:
            sock = socket.socket(socket.AF_UNIX)
            try:
                sock.connect(str(self.path))
            except OSError:
                sock.close()
                time.sleep(0.05)
            else:
                return sock
        return None

    def _read(self) -> None:
        sock = self._connect()
        if sock is None:
            return
        with self._changed:
            self._socket = sock
            self._changed.notify_all()
        rest = b""
        while True:
            try:
                chunk = sock.recv(4096)
            except OSError:
                chunk = b""
            now = time.monotonic()
            if not chunk:
                break
            *lines, rest = (rest + chunk).split(b"\n")
            for raw in lines:
                self._take(now, raw.decode(errors="replace").rstrip("\r"))
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _take(self, now: float, line: str) -> None:
        message = Message.parse(now, line)
        with self._changed:
            if message is None:
                self.other_lines.append(line)
            else:
                self.messages.append(message)
            self._changed.notify_all()
        if self.on_line is not None:
            self.on_line(line)

    def connected(self, timeout: float = 20.0) -> None:
        """Wait until the line to QEMU is open.

        Raises GuestError after TIMEOUT seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._socket is not None, timeout):
                raise GuestError(f"{self.path}: no QEMU within {timeout:.0f} s")

    def mark(self) -> int:
        """Return a position for `wait`'s SINCE: everything said so far is before it."""
        with self._changed:
            return len(self.messages)

    def wait(self, kind: str, *, timeout: float, since: int = 0) -> Message:
        """Return the first message of a kind at or after SINCE.

        Raises GuestError when it has not come after TIMEOUT seconds, when QEMU
        has closed the line, or when the guest reports something fatal.
        """
        deadline = time.monotonic() + timeout
        position = since
        with self._changed:
            while True:
                for message in self.messages[position:]:
                    if message.kind == kind:
                        return message
                    if message.kind == "fatal":
                        raise GuestError(f"{self.path}: {message.text}")
                position = len(self.messages)
                left = deadline - time.monotonic()
                if self._ended or left <= 0:
                    why = "QEMU closed the line" if self._ended else f"not within {timeout:.0f} s"
                    raise GuestError(
                        f"{self.path}: no {kind!r} from the guest: {why}; last: {self._tail()}"
                    )
                self._changed.wait(left)

    def _tail(self) -> str:
        lines = [message.text for message in self.messages[-3:]] + self.other_lines[-5:]
        return " | ".join(lines) or "nothing"

    def send(self, line: str) -> None:
        """Send the guest a command."""
        self.connected()
        assert self._socket is not None
        self._socket.sendall(line.encode() + b"\n")

    def verdict(self, timeout: float = 120.0) -> Verdict:
        """Have the guest check every page now, and return what it says.

        Raises GuestError when it does not answer: a guest whose memory is
        damaged may have no verdict to give.
        """
        since = self.mark()
        self.send("verdict")
        message = self.wait("verdict", timeout=timeout, since=since)
        number = {key: int(value) for key, value in message.fields.items()}
        return Verdict(
            ok=message.words[:1] == ("ok",),
            rounds=number["rounds"],
            pages=number["pages"],
            bad=number["bad"],
            text=message.text,
        )


def longest_silence(*consoles: GuestConsole, start: float, end: float) -> float:
    """Return the longest time without any message between START and END, in s.

    Over the consoles of both sides and with `beat N` in force this is what the
    guest's users felt of a migration, with a resolution of N ms: from the last
    line on the source to the first on the destination.
    """
    times = sorted(
        message.time
        for console in consoles
        for message in list(console.messages)
        if start <= message.time <= end
    )
    return max(
        (later - earlier for earlier, later in itertools.pairwise(times)),
        default=end - start,
    )
