# SPDX-License-Identifier: GPL-2.0-or-later
"""Frames of the TCP protocol between source and destination.

Pure: bytes in, values out, no sockets.

A frame is a header of 24 bytes, all of it big-endian, and a payload of `length` bytes:

    offset size
         0    2  magic "UM"
         2    1  version of the protocol
         3    1  kind of the frame
         4    4  length of the payload in bytes
         8    2  area: index in the list of areas of HELLO
        10    2  reserved, zero
        12    4  count: of pages (PAGES, PACKED, HAVE), offsets (REQUEST, DISCARD), ranges (ZERO,
                 SCATTERED)
        16    8  pgoff: first page (PAGES, PACKED, HAVE)

The first eight bytes keep their meaning in every version, so that peers of different versions can
tell each other so.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

from pyumem.errors import ForeignPeerError, ProtocolError, VersionError

VERSION: Final = 1
MAGIC: Final = 0x554D  # "UM"

HEADER: Final = struct.Struct("!HBBIHHIQ")
HEADER_SIZE: Final = HEADER.size
PREFIX_SIZE: Final = 8
"""Bytes of the header that are the same in every version."""

MAX_JSON: Final = 64 * 1024
"""Largest payload of a frame that carries JSON, in bytes."""
MAX_DEVICE: Final = 256 * 1024
"""Largest piece of device state in one frame, in bytes."""
MAX_LANES: Final = 16
"""Most background lanes of one migration."""
MAX_RUN: Final = 1024 * 1024
"""Largest payload of a PAGES frame, in bytes."""
MAX_PACKED: Final = 256 * 1024
"""What the pages of one PACKED frame are at most, before and all the more after compression, in
bytes: a receiver has room for that and no more.
"""
MAX_SCATTERED: Final = 256 * 1024
"""What the pages of one SCATTERED frame are at most, in bytes, and ..."""
MAX_SCATTERED_RANGES: Final = 64
"""... in ranges."""
_OFFSET_SIZE: Final = 8
_RANGE_SIZE: Final = 16
MAX_SCATTERED_HEAD: Final = MAX_SCATTERED_RANGES * _RANGE_SIZE
"""Bytes that these take at most."""
MAX_OFFSETS: Final = 4096
"""Most offsets of one REQUEST or DISCARD."""
MAX_RANGES: Final = 4096
"""Most ranges of one ZERO; what the driver marks in one call."""
MAX_BITMAP: Final = 32 * 1024
"""Largest payload of a HAVE, in bytes: 1 GiB of pages of 4 KiB."""


class Kind(IntEnum):
    """What a frame is.  The comment says which way it goes and on which lane."""

    CHALLENGE = 1  # destination, all lanes: JSON, first frame of a connection
    HELLO = 2  # source, all lanes: MAC and JSON
    WELCOME = 3  # destination, all lanes: MAC and JSON
    REFUSE = 4  # destination, all lanes: JSON with the reason; the connection ends
    DEVICE = 5  # source, control: a piece of QEMU's device state
    DEVICE_END = 6  # source, control: that was all of it
    PREPARED = 7  # destination, control: device state is loaded, the VM stands ready
    COMMIT = 8  # source, control: JSON; from here on only the destination may run
    RUNNING = 9  # destination, control: JSON; it does
    COMPLETE = 10  # destination, control: JSON; every page is here, with the report
    BYE = 11  # source, control: seen; both sides may forget
    ABORT = 12  # both ways, control, before COMMIT: JSON with the reason
    PAUSED = 13  # both ways, control, after COMMIT: JSON with the reason; pages do not flow
    PING = 14  # both ways, control, after COMMIT: nothing but a sign of life
    VERDICT = 15  # destination, control, after WELCOME to a resume: JSON; what became of the VM
    REQUEST = 16  # destination, urgent: offsets of pages that somebody waits for
    DISCARD = 17  # destination, urgent: offsets of pages that the guest discarded while missing
    PAGES = 18  # source, page lanes: a run of pages
    ZERO = 19  # source, page lanes: ranges that are zero
    END = 20  # source, background and pre-copy: this lane has nothing more to send
    HAVE = 21  # destination, control: a bitmap of pages that are here; see recovery.py, release.py
    CLEAN = 25  # source, control, after pre-copy: a bitmap of pages that may be seen as they are
    ROUND = 24  # both ways, pre-copy: all of a round was sent; all of it is written
    STARTTLS = 22  # source, control, instead of HELLO: TLS from here on, CHALLENGE comes again
    PACKED = 23  # source, background and pre-copy, where WELCOME took it: a run, compressed
    SCATTERED = 26  # source, background and pre-copy: ranges of pages, and their content


MAX_LENGTH: Final[dict[Kind, int]] = {
    Kind.CHALLENGE: MAX_JSON,
    Kind.HELLO: MAX_JSON,
    Kind.WELCOME: MAX_JSON,
    Kind.REFUSE: MAX_JSON,
    Kind.DEVICE: MAX_DEVICE,
    Kind.DEVICE_END: 0,
    Kind.PREPARED: MAX_JSON,
    Kind.COMMIT: MAX_JSON,
    Kind.RUNNING: MAX_JSON,
    Kind.COMPLETE: MAX_JSON,
    Kind.BYE: 0,
    Kind.ABORT: MAX_JSON,
    Kind.PAUSED: MAX_JSON,
    Kind.PING: 0,
    Kind.VERDICT: MAX_JSON,
    Kind.REQUEST: MAX_OFFSETS * _OFFSET_SIZE,
    Kind.DISCARD: MAX_OFFSETS * _OFFSET_SIZE,
    Kind.PAGES: MAX_RUN,
    Kind.ZERO: MAX_RANGES * _RANGE_SIZE,
    Kind.END: 0,
    Kind.HAVE: MAX_BITMAP,
    Kind.STARTTLS: 0,
    Kind.PACKED: MAX_PACKED,
    Kind.SCATTERED: MAX_SCATTERED_HEAD + MAX_SCATTERED,
    Kind.CLEAN: MAX_BITMAP,
    Kind.ROUND: 0,
}

# What else may come to, or from, a port: the first bytes of a connection and who says them.
_FOREIGN: Final = (
    (
        b"QEVM",
        "QEMU's own migration stream; use `umemctl migrate` on the source, not QEMU's `migrate`",
    ),
    (b"SSH-", "an SSH server"),
    (b"GET ", "an HTTP client"),
    (b"POST", "an HTTP client"),
    (b"HTTP", "an HTTP server"),
    (b"\x16\x03", "TLS"),
    (b'{"QM', "a QMP monitor"),
)


@dataclass(slots=True)
class Header:
    """A frame's header.  length is bytes of payload; what the rest means depends on the kind."""

    kind: Kind
    length: int
    area: int
    count: int
    pgoff: int


def pack(kind: Kind, length: int = 0, area: int = 0, count: int = 0, pgoff: int = 0) -> bytes:
    """Return a header."""
    return HEADER.pack(MAGIC, VERSION, kind, length, area, 0, count, pgoff)


def unpack(raw: bytes | bytearray | memoryview) -> Header:
    """Read a header of HEADER_SIZE bytes.

    Raises ForeignPeerError, VersionError, or ProtocolError for an unknown kind or a payload above
    its bound.
    """
    magic, version, kind, length, area, reserved, count, pgoff = HEADER.unpack_from(raw)
    if magic != MAGIC:
        raise ForeignPeerError(_describe_foreign(bytes(raw[:PREFIX_SIZE])))
    if version != VERSION:
        raise VersionError(
            f"the peer speaks version {version} of the protocol, this side version {VERSION}"
        )
    try:
        known = Kind(kind)
    except ValueError:
        raise ProtocolError(f"unknown frame kind {kind}") from None
    if length > MAX_LENGTH[known]:
        raise ProtocolError(
            f"{known.name} frame of {length} bytes, at most {MAX_LENGTH[known]} are allowed"
        )
    if reserved:
        raise ProtocolError(f"{known.name} frame with reserved field {reserved:#x}")
    return Header(known, length, area, count, pgoff)


def check_prefix(raw: bytes | bytearray | memoryview) -> None:
    """Look at the first PREFIX_SIZE bytes alone, for a peer that may never send a whole header.

    Raises ForeignPeerError or VersionError.
    """
    magic, version = struct.unpack_from("!HB", raw)
    if magic != MAGIC:
        raise ForeignPeerError(_describe_foreign(bytes(raw[:PREFIX_SIZE])))
    if version != VERSION:
        raise VersionError(
            f"the peer speaks version {version} of the protocol, this side version {VERSION}"
        )


def _describe_foreign(start: bytes) -> str:
    for magic, who in _FOREIGN:
        if start.startswith(magic):
            return f"this is not umem's protocol but {who}"
    return f"this is not umem's protocol (it starts with {start.hex(' ')})"


# --- pages ---


def check_range(what: str, area: str, pgoff: int, count: int, npages: int) -> None:
    """Refuse an empty range and one past the end of the area.

    Raises ProtocolError that names area and range.
    """
    if count < 1 or pgoff >= npages or count > npages - pgoff:
        raise ProtocolError(
            f"{what} of {count} page(s) from page {pgoff} on, area {area} has {npages} pages"
        )


def pack_pages(area: int, pgoff: int, count: int, page_size: int) -> bytes:
    """Return the header of a run of pages; count * page_size bytes follow it."""
    return pack(Kind.PAGES, count * page_size, area, count, pgoff)


def check_pages(header: Header, area: str, npages: int, page_size: int) -> None:
    """Check a PAGES header against its area.  Raises ProtocolError."""
    check_range("PAGES", area, header.pgoff, header.count, npages)
    if header.length != header.count * page_size:
        raise ProtocolError(
            f"PAGES of {header.count} page(s) of area {area} with {header.length} bytes, "
            f"{header.count * page_size} are expected"
        )


def pack_packed(area: int, pgoff: int, count: int, length: int) -> bytes:
    """Return the header of a run of pages that `length` bytes of compressed data follow."""
    return pack(Kind.PACKED, length, area, count, pgoff)


def check_packed(header: Header, area: str, npages: int, page_size: int) -> None:
    """Check a PACKED header against its area and its bounds.  Raises ProtocolError.

    Both lengths are in it: `length` compressed bytes become count * page_size, which is more.
    """
    check_range("PACKED", area, header.pgoff, header.count, npages)
    size = header.count * page_size
    if size > MAX_PACKED:
        raise ProtocolError(
            f"PACKED of {header.count} page(s) of area {area}, at most {MAX_PACKED // page_size} "
            "are allowed"
        )
    if not 0 < header.length < size:
        raise ProtocolError(
            f"PACKED of {header.count} page(s) from page {header.pgoff} on, area {area}, with "
            f"{header.length} bytes: not between 0 and {size}"
        )


def pack_scattered(area: int, ranges: Sequence[tuple[int, int]], page_size: int) -> bytes:
    """Return the header and the ranges (first page, count) of a SCATTERED frame; the content of all
    of them follows, in that order.
    """
    nr, pages = len(ranges), sum(count for _, count in ranges)
    if not 1 <= nr <= MAX_SCATTERED_RANGES or pages * page_size > MAX_SCATTERED:
        raise ValueError(f"{nr} ranges of {pages} pages in one SCATTERED")
    words: Iterable[int] = (word for one in ranges for word in one)
    length = nr * _RANGE_SIZE + pages * page_size
    return pack(Kind.SCATTERED, length, area, nr) + struct.pack(f"!{2 * nr}Q", *words)


def scattered_ranges_size(header: Header, area: str) -> int:
    """Return how many bytes of a SCATTERED frame are its ranges.  Raises ProtocolError."""
    size = header.count * _RANGE_SIZE
    if not 1 <= header.count <= MAX_SCATTERED_RANGES or size >= header.length:
        raise ProtocolError(
            f"SCATTERED of {header.count} range(s) of area {area} with {header.length} bytes"
        )
    return size


def unpack_scattered(
    header: Header, raw: bytes | bytearray | memoryview, area: str, npages: int, page_size: int
) -> list[tuple[int, int]]:
    """Return the ranges of a SCATTERED, the first scattered_ranges_size() bytes of its payload.

    Raises ProtocolError for one that is empty or past the end, and where they are not what the
    frame has content for.
    """
    ranges = _ranges("SCATTERED", raw, header.count, area, npages)
    content = sum(count for _, count in ranges) * page_size
    if content > MAX_SCATTERED or header.length != header.count * _RANGE_SIZE + content:
        raise ProtocolError(
            f"SCATTERED of {header.count} range(s) of area {area} with {header.length} bytes, "
            f"{content} of content are expected, {MAX_SCATTERED} allowed"
        )
    return ranges


def _ranges(
    what: str, raw: bytes | bytearray | memoryview, nr: int, area: str, npages: int
) -> list[tuple[int, int]]:
    words = struct.unpack(f"!{2 * nr}Q", raw)
    ranges = list(zip(words[0::2], words[1::2], strict=True))
    for pgoff, count in ranges:
        check_range(what, area, pgoff, count, npages)
    return ranges


def pack_offsets(kind: Kind, area: int, offsets: Sequence[int]) -> bytes:
    """Return a REQUEST or DISCARD frame, header and payload, of at most MAX_OFFSETS offsets."""
    count = len(offsets)
    if not 1 <= count <= MAX_OFFSETS:
        raise ValueError(f"{count} offsets in one frame, 1..{MAX_OFFSETS} are allowed")
    return pack(kind, count * _OFFSET_SIZE, area, count) + struct.pack(f"!{count}Q", *offsets)


def unpack_offsets(
    header: Header, payload: bytes | bytearray | memoryview, area: str, npages: int
) -> tuple[int, ...]:
    """Return the offsets of a REQUEST or DISCARD.  Raises ProtocolError for one past the end."""
    if (
        header.length != header.count * _OFFSET_SIZE
        or len(payload) != header.length
        or not header.count
    ):
        raise ProtocolError(
            f"{header.kind.name} of {header.count} offset(s) with {header.length} bytes of payload"
        )
    offsets: tuple[int, ...] = struct.unpack(f"!{header.count}Q", payload)
    highest = max(offsets)
    if highest >= npages:
        raise ProtocolError(
            f"{header.kind.name} for page {highest}, area {area} has {npages} pages"
        )
    return offsets


def pack_ranges(area: int, ranges: Sequence[tuple[int, int]]) -> bytes:
    """Return a ZERO frame, header and payload, of at most MAX_RANGES ranges (first page, count)."""
    nr = len(ranges)
    if not 1 <= nr <= MAX_RANGES:
        raise ValueError(f"{nr} ranges in one frame, 1..{MAX_RANGES} are allowed")
    words: Iterable[int] = (word for one in ranges for word in one)
    return pack(Kind.ZERO, nr * _RANGE_SIZE, area, nr) + struct.pack(f"!{2 * nr}Q", *words)


def unpack_ranges(
    header: Header, payload: bytes | bytearray | memoryview, area: str, npages: int
) -> list[tuple[int, int]]:
    """Return the ranges of a ZERO.  Raises ProtocolError for an empty one or one past the end."""
    if (
        header.length != header.count * _RANGE_SIZE
        or len(payload) != header.length
        or not header.count
    ):
        raise ProtocolError(
            f"ZERO of {header.count} range(s) with {header.length} bytes of payload"
        )
    return _ranges("ZERO", payload, header.count, area, npages)


def pack_bitmap(
    area: int, pgoff: int, count: int, bits: bytes | memoryview, kind: Kind = Kind.HAVE
) -> bytes:
    """Return a HAVE or CLEAN frame: bit i of the bytes, the lowest of each byte first, stands for
    page pgoff + i.
    """
    return pack(kind, len(bits), area, count, pgoff) + bits


def check_bitmap(header: Header, area: str, npages: int) -> None:
    """Check a HAVE or CLEAN header against its area.  Raises ProtocolError."""
    what = header.kind.name
    check_range(what, area, header.pgoff, header.count, npages)
    if header.length != -(-header.count // 8):
        raise ProtocolError(
            f"{what} of {header.count} page(s) of area {area} with {header.length} bytes"
        )


# --- JSON ---


def pack_json(kind: Kind, message: dict[str, Any], mac: bytes = b"") -> bytes:
    """Return a frame with a JSON object, after a MAC where the kind has one."""
    payload = mac + json.dumps(message, separators=(",", ":"), sort_keys=True).encode()
    if len(payload) > MAX_LENGTH[kind]:
        raise ValueError(
            f"{kind.name} of {len(payload)} bytes, at most {MAX_LENGTH[kind]} are allowed"
        )
    return pack(kind, len(payload)) + payload


def unpack_json(kind: Kind, payload: bytes | bytearray | memoryview) -> dict[str, Any]:
    """Return the object of a JSON payload (without its MAC).  Raises ProtocolError."""
    try:
        message = json.loads(bytes(payload))
    except (ValueError, RecursionError) as e:
        raise ProtocolError(f"{kind.name} is not JSON: {e}") from None
    if not isinstance(message, dict):
        raise ProtocolError(f"{kind.name} is not a JSON object")
    return message
