# SPDX-License-Identifier: GPL-2.0-or-later
"""What the same costs QEMU's own post-copy on the processors of this machine, over loopback: its
background stream, and what a page costs a vCPU that needs it.  TCG runs the guest; neither figure
has its work in it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
from qemu.qmp import QMPError

from bench.migration.monitor import Monitor
from bench.migration.plan import POSTCOPY
from tests.vm.guest import GuestConsole, GuestError, GuestSpec

_UNLIMITED = 1 << 40
_SLOW = 1 << 20
"""Bytes per second of the background, as long as pages are to be asked for."""
_READ_MIB, _GUEST_MIB = 256, 512
_LIMIT_S = 120.0


@dataclass(frozen=True)
class Figures:
    """Of one round."""

    request_mean_us: float
    """From QEMU's reading of a fault to the page being placed: postcopy-blocktime by
    postcopy-requests.  It tells no more of single ones."""
    stream_mib_s: float


@dataclass
class Pair:
    """A QEMU and the one that takes over."""

    source: Monitor
    destination: Monitor

    def postcopy(self, background: int) -> float:
        """Begin to migrate, by post-copy from the first page on; return when it had switched."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            uri = f"tcp:127.0.0.1:{free.getsockname()[1]}"
        capabilities = [{"capability": name, "state": True} for name in ("events", *POSTCOPY)]
        limits = {"max-bandwidth": _UNLIMITED, "max-postcopy-bandwidth": background}
        for monitor in (self.source, self.destination):
            monitor.execute("migrate-set-capabilities", capabilities=capabilities)
            monitor.execute("migrate-set-parameters", **limits)
        self.destination.execute("migrate-incoming", uri=uri)
        self.source.execute("migrate", uri=uri)
        self.source.wait("MIGRATION", _LIMIT_S, status="active")
        self.source.execute("migrate-start-postcopy")
        return self.source.wait("MIGRATION", _LIMIT_S, status="postcopy-active")

    def requests(self) -> int:
        """Return how many pages were asked for."""
        return int(self.source.execute("query-migrate")["ram"]["postcopy-requests"])

    def end(self) -> float:
        """Wait until every page is there; return when."""
        return self.destination.wait("MIGRATION", _LIMIT_S, status="completed")


class Peer:
    """A QEMU of the distribution's."""

    def __init__(self, program: Path, build: Path, scratch: Path) -> None:
        """build: where the guest is."""
        self._program = program
        self._scratch = scratch
        os.environ["UMEM_GUEST_KERNEL"] = str(build / "guest" / "vmlinux")
        os.environ["UMEM_GUEST_INITRD"] = str(build / "bench-guest" / "initramfs.cpio")

    def measure(self, ram: Path, nr_requests: int) -> Figures:
        """Do one round.  ram: a file, the memory that is streamed.  Raises ClickException."""
        try:
            return Figures(self._request_us(nr_requests), self._stream(ram))
        except (OSError, QMPError, TimeoutError, GuestError) as e:
            raise click.ClickException(f"{self._program}: {e}") from e

    @contextlib.contextmanager
    def _pair(self, one: tuple[str, ...], other: tuple[str, ...]) -> Iterator[Pair]:
        with contextlib.ExitStack() as stack:
            monitors = []
            for side, words in {
                "source": one,
                "destination": (*other, "-incoming", "defer"),
            }.items():
                qmp = self._scratch / f"{side}.qmp"
                qmp.unlink(missing_ok=True)
                monitor = ("-qmp", f"unix:{qmp},server=on,wait=off")
                process = stack.enter_context(subprocess.Popen([self._program, *words, *monitor]))
                stack.callback(process.kill)
                monitors.append(stack.enter_context(Monitor(qmp)))
            yield Pair(*monitors)

    def _stream(self, ram: Path) -> float:
        """Return how fast memory goes that nobody asks for, in MiB/s: the VM is paused."""
        size = ram.stat().st_size
        machine = (
            *("-machine", "q35,memory-backend=ram0", "-accel", "tcg", "-m", f"{size >> 20}M"),
            *("-nodefaults", "-vga", "none", "-display", "none", "-S"),
        )
        backing = f"memory-backend-file,id=ram0,size={size},mem-path={ram},share=on"
        plain = f"memory-backend-ram,id=ram0,size={size}"
        with self._pair((*machine, "-object", backing), (*machine, "-object", plain)) as pair:
            began = pair.postcopy(_UNLIMITED)
            return size / (pair.end() - began) / (1 << 20)

    def _request_us(self, nr_requests: int) -> float:
        """Return what a page costs that a vCPU needs, on average, in microseconds."""
        serials = [self._scratch / f"{side}.serial" for side in ("source", "destination")]
        words = []
        for serial in serials:
            serial.unlink(missing_ok=True)
            spec = GuestSpec("read", mb=_READ_MIB, memory=f"{_GUEST_MIB}M", accel="tcg")
            words.append(tuple(spec.qemu_args(serial)))
        with (
            GuestConsole(serials[0]) as before,
            GuestConsole(serials[1]) as after,
            self._pair(words[0], words[1]) as pair,
        ):
            before.wait("step", timeout=_LIMIT_S)
            pair.postcopy(_SLOW)
            deadline = time.monotonic() + _LIMIT_S
            while pair.requests() < nr_requests:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"fewer than {nr_requests} pages asked for")
                time.sleep(0.05)
            pair.source.execute("migrate-set-parameters", **{"max-postcopy-bandwidth": _UNLIMITED})
            pair.end()
            told = pair.destination.execute("query-migrate")
            blocked_ms = float(sum(told["postcopy-vcpu-blocktime"]))
            if not after.verdict().ok:
                raise click.ClickException("the guest's memory is damaged")
            return 1000 * blocked_ms / pair.requests()
