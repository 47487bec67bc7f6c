# SPDX-License-Identifier: GPL-2.0-or-later
"""Reading the source's RAM file without filling its holes."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyumem.errors import UmemError
from pyumem.ram import PAGE_SIZE, RamFile


@pytest.fixture
def path() -> Iterator[Path]:
    fd, name = tempfile.mkstemp(dir="/dev/shm")
    os.close(fd)
    yield Path(name)
    Path(name).unlink()


def make(path: Path, pages: str) -> None:
    """One character a page: . hole, 0 zero with memory, x content, 1 content in its last byte."""
    with path.open("wb") as file:
        file.truncate(len(pages) * PAGE_SIZE)
        for n, kind in enumerate(pages):
            data = {"0": bytes(PAGE_SIZE), "x": b"x" * PAGE_SIZE, "1": bytes(PAGE_SIZE - 1) + b"1"}
            if kind != ".":
                file.seek(n * PAGE_SIZE)
                file.write(data[kind])


def told(ram: RamFile, pgoff: int, count: int) -> str:
    found = []
    at = pgoff
    for content, first, nr in ram.pieces(pgoff, count):
        assert first == at and nr >= 1
        at += nr
        found.append(("c" if content else "z") * nr)
    assert at == pgoff + count
    return "".join(found)


EXPECTED = str.maketrans(".0x1", "zzcc")


@given(st.text("..00xx1", min_size=1, max_size=60), st.data())
def test_pieces(pages: str, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        path = Path(directory) / "ram"
        make(path, pages)
        before = path.stat().st_blocks
        with RamFile.open(str(path), "ram0", len(pages) * PAGE_SIZE) as ram:
            start = data.draw(st.integers(0, len(pages) - 1))
            count = data.draw(st.integers(1, len(pages) - start))
            want = pages.translate(EXPECTED)
            assert told(ram, 0, len(pages)) == want
            assert told(ram, start, count) == want[start : start + count]
        assert path.stat().st_blocks == before, "a hole was filled"


def test_a_large_hole_is_one_extent(path: Path) -> None:
    make(path, "x")
    os.truncate(path, 1 << 36)
    with RamFile.open(str(path), "ram0", 1 << 36) as ram:
        assert list(ram.extents(0, ram.npages)) == [(True, 0, 1), (False, 1, ram.npages - 1)]
    assert path.stat().st_blocks == PAGE_SIZE // 512


def test_views_are_the_file(path: Path) -> None:
    content = random.Random(1).randbytes(4 * PAGE_SIZE)
    path.write_bytes(content)
    with RamFile.open(str(path), "ram0", 4 * PAGE_SIZE) as ram:
        with ram.view(1, 2) as view:
            assert bytes(view) == content[PAGE_SIZE : 3 * PAGE_SIZE]
            assert view.readonly
        with path.open("r+b") as file:
            file.seek(2 * PAGE_SIZE)
            file.write(bytes(PAGE_SIZE))
        assert told(ram, 0, 4) == "cczc"


def test_a_device_has_no_holes() -> None:
    """A node of the driver answers neither SEEK_DATA nor fstat's size."""
    with RamFile(os.open("/dev/zero", os.O_RDONLY), "ram0", 4 * PAGE_SIZE) as ram:
        assert list(ram.extents(1, 3)) == [(True, 1, 3)]
        assert told(ram, 0, 4) == "zzzz"


def test_what_is_wrong_is_named(path: Path) -> None:
    make(path, "xx")
    with pytest.raises(UmemError, match=r"ram7.*8192 bytes, QEMU says 12288"):
        RamFile.open(str(path), "ram7", 3 * PAGE_SIZE)
    with pytest.raises(UmemError, match="not whole pages"):
        RamFile.open(str(path), "ram7", PAGE_SIZE + 1)
    with pytest.raises(UmemError, match=r"ram7.*No such file"):
        RamFile.open("/dev/shm/none", "ram7", PAGE_SIZE)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(UmemError):
        RamFile.open(str(path), "ram7", 3 * PAGE_SIZE)
    assert len(list(Path("/proc/self/fd").iterdir())) == before, "a descriptor was left open"
