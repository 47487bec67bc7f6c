# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether pages that nobody waits for may go compressed, as the two daemons agree upon it; what
compresses is pyumem.lanes.compress.

The source offers it in the HELLO of a background or pre-copy lane, the destination takes it in its
WELCOME, or does not.  Workers run without site-packages: they are told where the one library is.
"""

from __future__ import annotations

import functools
from enum import StrEnum
from pathlib import Path
from typing import Final

from pyumem.errors import UsageError
from pyumem.hello import Hello, Lane

ZSTD: Final = "zstd"
LANES: Final = frozenset({Lane.BACKGROUND, Lane.PRECOPY})
"""Of the others each page is one that the guest waits for."""


class Compress(StrEnum):
    """What the user wants."""

    AUTO = "auto"  # while it pays: pyumem.lanes.payoff
    ON = "on"  # always, where the destination can
    OFF = "off"


@functools.cache
def directory() -> str:
    """Return where the library is, empty when it is not there or cannot be loaded."""
    try:
        # Only whoever may need it pays for this.
        import zstandard
    except ImportError:
        return ""
    return str(Path(zstandard.__file__).parent)


def offer(wish: Compress) -> str:
    """Return what HELLO offers: a name, or nothing.  Raises UsageError for what cannot be."""
    if wish is Compress.OFF:
        return ""
    if not directory() and wish is Compress.ON:
        raise UsageError("--compress on: this host's Python has no zstandard")
    return ZSTD if directory() else ""


def accept(hello: Hello) -> str:
    """Return what WELCOME says to an offer."""
    asked = hello.lane in LANES and hello.compression == ZSTD
    return ZSTD if asked and directory() else ""
