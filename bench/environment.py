# SPDX-License-Identifier: GPL-2.0-or-later
"""What a figure means nothing without: where it was measured, and of what."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess

from tests.vm import harness, kvm


def _git(*words: str) -> str:
    done = subprocess.run(
        ["git", *words], cwd=harness.ROOT, check=False, capture_output=True, text=True
    )
    return done.stdout.strip()


def environment(kernel: str, cpus: int, mem: str, rounds: int) -> dict[str, object]:
    """Return what a figure means nothing without."""
    return {
        "kernel": harness.kernel_release(kernel),
        "cpus": cpus,
        "memory": mem,
        "accel": "kvm" if kvm.really_works(harness.BUILD) else "tcg",
        **here(rounds),
    }


def here(rounds: int) -> dict[str, object]:
    """Return the part of it that is not about a test machine."""
    return {
        "rounds": rounds,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "modified": bool(_git("status", "--porcelain")),
        "host_kernel": platform.release(),
        "host_cpus": os.cpu_count(),
        "host_load": os.getloadavg()[0],
    }
