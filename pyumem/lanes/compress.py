# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs of pages, compressed with zstd from the RAM into a buffer, and from a buffer into another.

The library (zstandard) is loaded by its place, which the parent tells: a worker runs without
site-packages, and gets that one package and nothing else.  Of its interfaces the stream readers
are used, since they read from a buffer and write into one: no page becomes a `bytes` object here
either.  What it costs beside the work itself is an object a run, and at the destination the copy
into the buffer that pages are received into otherwise.
"""

from __future__ import annotations

import importlib.util
import mmap
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pyumem import wire
from pyumem.errors import ProtocolError, UmemError
from pyumem.lanes.payoff import Decision
from pyumem.stats import Counter, StatsBlock

if TYPE_CHECKING:
    from types import ModuleType

    from zstandard import ZstdCompressor, ZstdDecompressor

LEVEL: Final = 1
"""zstd's level: a higher one costs more time than it saves on a link that is worth the trouble."""
_WORTH: Final = 7 / 8
"""What a run has to become, of its size, to go compressed: less is not worth unpacking it."""
_NAME: Final = "zstandard"


def load(directory: str) -> ModuleType:
    """Return the library that is in a directory.  Raises UmemError."""
    if _NAME in sys.modules:
        return sys.modules[_NAME]
    spec = importlib.util.spec_from_file_location(
        _NAME, Path(directory) / "__init__.py", submodule_search_locations=[directory]
    )
    assert spec is not None and spec.loader is not None
    module = sys.modules[_NAME] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (ImportError, OSError) as e:
        del sys.modules[_NAME]
        raise UmemError(f"{directory}: cannot be loaded: {e}") from e
    return module


class Packer:
    """Compresses what the decision wants compressed."""

    def __init__(
        self, directory: str, decision: Decision, stats: StatsBlock, *, live: bool = False
    ) -> None:
        """Load the library from its directory.  live: somebody may write the pages meanwhile.

        Raises UmemError.
        """
        self.decision: Final = decision
        self._still = memoryview(mmap.mmap(-1, wire.MAX_PACKED)) if live else None
        self._stats = stats
        self._zstd: ZstdCompressor = load(directory).ZstdCompressor(level=LEVEL)
        self._out = memoryview(mmap.mmap(-1, wire.MAX_PACKED))

    def pack(self, run: memoryview) -> memoryview | None:
        """Return the run, compressed, until the next call; None when it is to go as it is."""
        size = len(run)
        if size > wire.MAX_PACKED or not self.decision.wants():
            return None
        began = time.monotonic()
        if self._still is not None:
            # zstd promises nothing for a source that changes while it looks at it twice.
            with self._still[:size] as still:
                still[:] = run
                packed = self._packed(still)
        else:
            packed = self._packed(run)
        length = len(packed) if packed else size
        self.decision.packed(size, length, time.monotonic() - began)
        if packed:
            self._stats.add(Counter.BYTES_BEFORE, size)
            self._stats.add(Counter.BYTES_AFTER, length)
        return packed

    def _packed(self, run: memoryview) -> memoryview | None:
        room = int(len(run) * _WORTH)
        # Ends early when there is no room left: what does not shrink costs little.
        with self._out[:room] as out, self._zstd.stream_reader(run, size=len(run)) as reader:
            length = reader.readinto(out)
        return self._out[:length] if length < room else None


class Unpacker:
    """Makes pages of what a Packer made."""

    def __init__(self, directory: str) -> None:
        """Load the library from its directory.  Raises UmemError."""
        library = load(directory)
        # A frame may ask for as much memory as it likes: not for more than the pages are.
        self._zstd: ZstdDecompressor = library.ZstdDecompressor(max_window_size=wire.MAX_PACKED)
        self._error: type[Exception] = library.ZstdError
        self._more = memoryview(bytearray(1))

    def unpack(self, packed: memoryview, pages: memoryview) -> None:
        """Fill the pages, and never write beyond them.

        Raises ProtocolError for data that is not zstd's, or becomes less than that, or more.
        """
        try:
            # Across frames: what stands behind the first one is not passed over in silence.
            with self._zstd.stream_reader(packed, read_across_frames=True) as reader:
                length = reader.readinto(pages)
                more = length == len(pages) and reader.readinto(self._more)
        except self._error as e:
            raise ProtocolError(f"not zstd data: {e}") from None
        if length < len(pages) or more:
            gives = "more" if more else f"{length} bytes"
            raise ProtocolError(
                f"{len(packed)} compressed bytes give {gives}, {len(pages)} bytes were announced"
            )
