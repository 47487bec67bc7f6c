# SPDX-License-Identifier: GPL-2.0-or-later
"""Every call of the driver while each allocation and each user copy in it fails, one at a time.

Needs a kernel with fault injection: make test-debug-kernel.  Elsewhere conftest.py leaves it out.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .build import BUILD, program
from .support import SLOW

SAID = BUILD.parent / "vm" / "failnth.txt"
DEBUG = Path("/sys/kernel/debug")
# What is failed at all, and that it is not told in the kernel log, where a stack would look like
# a bug.
KNOBS = {
    "failslab/ignore-gfp-wait": "N",
    "failslab/verbose": "0",
    "fail_page_alloc/ignore-gfp-wait": "N",
    "fail_page_alloc/ignore-gfp-highmem": "N",
    "fail_page_alloc/min-order": "0",
    "fail_page_alloc/verbose": "0",
    "fail_usercopy/verbose": "0",
}
# Those in which the driver, or who works for it, allocates or copies for certain.
MUST_FAIL = (
    "open",
    "UMEM_INIT",
    "UMEM_DEV_CREATE_UMEM",
    "UMEM_DEV_LIST",
    "UMEM_DEV_REATTACH",
    "UMEM_GET_PAGE_REQUEST",
    "UMEM_MARK_PAGE_CACHED",
    "UMEM_MARK_PAGE_POISONED",
    "UMEM_GET_INFO",
    "UMEM_GET_BITMAP",
    "UMEM_GET_STATS",
    "UMEM_SET_LOSS_POLICY",
    "UMEM_MAKE_VMA_ANONYMOUS",
    "UMEM_SET_DIRTY_LOG on",
    "UMEM_GET_DIRTY",
    "write",
    "open of a node",
    "mmap of a node",
    "mmap after UMEM_INIT",
    "open of a file",
    "mmap of a file",
    "MADV_REMOVE",
    "mount",
)


@pytest.fixture
def failures() -> Iterator[None]:
    if not (DEBUG / "failslab").exists():
        subprocess.run(["mount", "-t", "debugfs", "none", DEBUG], check=True)
    before = {knob: (DEBUG / knob).read_text() for knob in KNOBS}
    for knob, value in KNOBS.items():
        (DEBUG / knob).write_text(value)
    yield
    for knob, value in before.items():
        (DEBUG / knob).write_text(value)


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Path]:
    where = tmp_path / "mounted"
    where.mkdir()
    subprocess.run(["mount", "-t", "umem", "none", where], check=True)
    yield where
    subprocess.run(["umount", where], check=True)


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("failures")
def test_nothing_is_left_of_a_call_that_failed(mount: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    # In a file, so that one can look on from outside.
    with SAID.open("w") as said:
        done = subprocess.run(
            [program("failnth"), mount, empty],
            check=False,
            stdout=said,
            stderr=said,
            timeout=290 * SLOW,
        )
    text = SAID.read_text()
    print(text)
    assert done.returncode == 0
    told = {
        name: int(count)
        for name, count in re.findall(r"^(.*): \d+ failures, (\d+) told$", text, re.M)
    }
    assert [name for name in MUST_FAIL if not told[name]] == []
