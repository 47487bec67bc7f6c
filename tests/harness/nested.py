# SPDX-License-Identifier: GPL-2.0-or-later
"""Shows what is wrong with TCG's emulated SVM: a guest under KVM, its RAM a plain file, no umem.ko.

    python -m tests.vm run --no-module --env PYTHONPATH=$PWD -- python -m tests.harness.nested 4

Its pages are moved between two NUMA nodes again and again, each of which takes them out of the
nested page tables.  Some guests panic within a minute, in an interrupt that is delivered twice.
See Documentation/testing.rst.
"""

import ctypes
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.vm.guest import GuestConsole, GuestError, GuestSpec

SYS_MIGRATE_PAGES = 256
SECONDS = 60.0
RAM = Path("/dev/shm/nested-ram")
libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class LoudSpec(GuestSpec):
    """A guest whose kernel says why it dies."""

    def command_line(self) -> str:
        """Return the guest's kernel command line."""
        quiet = super().command_line()
        return quiet.replace("quiet loglevel=1", "loglevel=7 ignore_loglevel oops=panic")


def move_pages(pid: int, source: int, target: int) -> None:
    """Move the pages of a process from one NUMA node to another."""
    nodes = [ctypes.c_ulong(1 << node) for node in (source, target)]
    libc.syscall(SYS_MIGRATE_PAGES, pid, 64, *(ctypes.byref(node) for node in nodes))


def one_guest() -> str:
    """Boot a guest, move its pages for a while, and say how it is."""
    backend = f"memory-backend-file,id=m,size=256M,mem-path={RAM},share=on"
    extra = ("-cpu", "host,-svm", "-object", backend, "-machine", "memory-backend=m")
    spec = LoudSpec(workload="verify", mb=128, memory="256M", extra=extra)
    with tempfile.TemporaryDirectory() as folder:
        serial = Path(folder) / "serial"
        argv = [os.environ["UMEM_QEMU"], *spec.qemu_args(serial)]
        with subprocess.Popen(argv) as qemu, GuestConsole(serial) as console:
            try:
                console.wait("verify", timeout=120)
                end, moves = time.monotonic() + SECONDS, 0
                while time.monotonic() < end and qemu.poll() is None:
                    move_pages(qemu.pid, moves % 2, 1 - moves % 2)
                    moves += 1
                if qemu.poll() is not None:
                    return f"gone after {moves} moves: " + "\n".join(console.other_lines[-30:])
                return f"well after {moves} moves: {console.verdict(60).text}"
            except GuestError as e:
                return f"not well: {e}"
            finally:
                qemu.kill()
                RAM.unlink(missing_ok=True)


def main() -> None:
    """Try some guests."""
    for number in range(int(sys.argv[1])):
        print(number, one_guest(), flush=True)


if __name__ == "__main__":
    main()
