# SPDX-License-Identifier: GPL-2.0-or-later
"""What a guest that says nothing more is doing: whether it waits for a page, and where its vCPUs
are.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from qemu.qmp import QMPError

from bench.migration.monitor import Monitor
from bench.migration.usage import descendants

_ASKED = ("info status", "info registers -a", "info lapic", "info pic")
_LOOKS = 3
"""A second apart: one who runs is somewhere else then."""


def autopsy(pid: int, monitor: Monitor) -> str:
    """Return, of a QEMU, what each thread waits for in the kernel, and what its monitor knows of
    the vCPUs and their interrupts.
    """
    lines = []
    pids = (pid, *descendants(pid))  # umem-qemu is QEMU's parent
    tasks = [task for one in pids for task in sorted(Path(f"/proc/{one}/task").glob("*"))]
    for look in range(_LOOKS):
        if look:
            time.sleep(1)
        lines.append(f"--- look {look + 1}")
        for task in tasks:
            with contextlib.suppress(OSError):
                comm = (task / "comm").read_text().strip()
                state = (task / "stat").read_text().rpartition(")")[2].split()
                ran = (task / "schedstat").read_text().split()[0]
                stack = (task / "stack").read_text().strip().replace("[<0>] ", "")
                lines += [f"{task.name} {comm}: {state[0]}, ran {int(ran) // 10**6} ms", stack]
        for command in _ASKED:
            with contextlib.suppress(QMPError, TimeoutError):
                said = monitor.execute("human-monitor-command", 5.0, **{"command-line": command})
                lines += [f"(qemu) {command}", str(said).strip()]
    return "\n".join(lines)
