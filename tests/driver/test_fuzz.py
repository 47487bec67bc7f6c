# SPDX-License-Identifier: GPL-2.0-or-later
"""Random calls with random arguments from many processes: see progs/fuzz.c.

UMEM_FUZZ_SECONDS and UMEM_FUZZ_SEED make it longer, or like one that failed; that is what
`make fuzz-driver SECONDS=600 SEED=...` sets.
"""

from __future__ import annotations

import os
import re
import subprocess
import time

import pytest

from .build import program

SECONDS = int(os.environ.get("UMEM_FUZZ_SECONDS", "10"))
SEED = int(os.environ.get("UMEM_FUZZ_SEED", str(int(time.time()))))

# A call of which nearly all are refused, or that all succeed, was not tried with both.
BOTH = ["create", "list", "reattach", "get", "mark", "info", "bitmap", "read", "write", "mmap"]
BOTH += ["log", "dirty"]


@pytest.mark.timeout(SECONDS + 200)
def test_random_calls() -> None:
    fuzz = subprocess.run(
        [program("fuzz"), str(SECONDS), str(SEED)],
        check=False,
        capture_output=True,
        text=True,
        timeout=SECONDS + 190,
    )
    print(fuzz.stdout, fuzz.stderr)
    assert fuzz.returncode == 0
    calls = {
        name: (int(ok), int(bad)) for name, ok, bad in re.findall(r"(\w+)=(\d+)/(\d+)", fuzz.stdout)
    }
    counts = {name: int(n) for name, n in re.findall(r"(\w+)=(\d+)\b(?!/)", fuzz.stdout)}
    assert counts["seed"] == SEED
    assert counts["bad"] == 0
    # It did something: words that had to be right were looked at, and pages were asked for.
    assert counts["checked"] > 0
    assert counts["served"] > 0
    untried = [name for name, (ok, bad) in calls.items() if not ok + bad]
    assert not untried, untried
    for name in BOTH:
        assert min(calls[name]) > 0, (name, calls[name])
