# SPDX-License-Identifier: GPL-2.0-or-later
"""Frames: what is packed is what is unpacked, and nothing else gets through."""

from __future__ import annotations

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyumem import wire
from pyumem.errors import ForeignPeerError, ProtocolError, VersionError
from pyumem.wire import Header, Kind

u16 = st.integers(0, (1 << 16) - 1)
u32 = st.integers(0, (1 << 32) - 1)
u64 = st.integers(0, (1 << 64) - 1)


@given(st.sampled_from(Kind), st.data(), u16, u32, u64)
def test_a_header_comes_back(
    kind: Kind, data: st.DataObject, area: int, count: int, pgoff: int
) -> None:
    length = data.draw(st.integers(0, wire.MAX_LENGTH[kind]))
    raw = wire.pack(kind, length, area, count, pgoff)
    assert len(raw) == wire.HEADER_SIZE == 24
    assert wire.unpack(raw) == Header(kind, length, area, count, pgoff)
    wire.check_prefix(raw)


def test_the_header_is_what_the_documentation_says() -> None:
    raw = wire.pack(Kind.PAGES, 0x2000, 1, 2, 0x123456789A)
    assert raw.hex(" ") == (
        "55 4d 01 12 00 00 20 00 00 01 00 00 00 00 00 02 00 00 00 12 34 56 78 9a"
    )


@given(st.binary(min_size=24, max_size=24))
def test_garbage_is_refused(raw: bytes) -> None:
    try:
        header = wire.unpack(raw)
    except ProtocolError:
        return
    assert raw.startswith(b"UM\x01") and header.length <= wire.MAX_LENGTH[header.kind]


@pytest.mark.parametrize("kind", Kind)
def test_a_payload_above_its_bound_is_refused(kind: Kind) -> None:
    with pytest.raises(ProtocolError, match=kind.name):
        wire.unpack(wire.pack(kind, wire.MAX_LENGTH[kind] + 1))


@pytest.mark.parametrize(
    ("start", "who"),
    [
        (b"QEVM\x00\x00\x00\x03", "QEMU's own migration stream"),
        (b"SSH-2.0-", "SSH"),
        (b"GET / HT", "HTTP client"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01", "TLS"),
        (b'{"QMP": ', "QMP"),
        (b"\xff\xfe\x00\x00abcd", "starts with ff fe 00 00"),
    ],
)
def test_foreign_peers_are_named(start: bytes, who: str) -> None:
    with pytest.raises(ForeignPeerError, match=who):
        wire.check_prefix(start)
    with pytest.raises(ForeignPeerError, match=who):
        wire.unpack(start + bytes(16))


def test_another_version_is_told_even_with_an_unknown_kind() -> None:
    raw = bytearray(wire.pack(Kind.BYE))
    raw[2], raw[3] = 2, 250
    for check in (wire.check_prefix, wire.unpack):
        with pytest.raises(VersionError, match="version 2 of the protocol, this side version 1"):
            check(raw)


def test_unknown_kind_and_reserved_field() -> None:
    raw = bytearray(wire.pack(Kind.BYE))
    raw[3] = 250
    with pytest.raises(ProtocolError, match="kind 250"):
        wire.unpack(raw)
    raw = bytearray(wire.pack(Kind.BYE))
    raw[11] = 1
    with pytest.raises(ProtocolError, match="reserved"):
        wire.unpack(raw)


# --- pages ---

SIZE = 1 << 20


@given(st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=200), u16)
def test_offsets_come_back(offsets: list[int], area: int) -> None:
    raw = wire.pack_offsets(Kind.REQUEST, area, offsets)
    header = wire.unpack(raw)
    assert header.area == area
    assert list(wire.unpack_offsets(header, raw[24:], "a", SIZE)) == offsets


@given(st.lists(st.tuples(u64, u64), min_size=1, max_size=50), st.integers(1, SIZE))
def test_ranges_are_within_the_area_or_refused(ranges: list[tuple[int, int]], npages: int) -> None:
    raw = wire.pack_ranges(3, ranges)
    good = all(count >= 1 and pgoff + count <= npages for pgoff, count in ranges)
    try:
        assert wire.unpack_ranges(wire.unpack(raw), raw[24:], "a", npages) == ranges
        assert good
    except ProtocolError as e:
        assert not good and "area a has" in str(e)


@given(u32, u64, st.integers(1, SIZE), st.integers(0, wire.MAX_RUN))
def test_pages_are_within_the_area_or_refused(
    count: int, pgoff: int, npages: int, length: int
) -> None:
    header = Header(Kind.PAGES, length, 0, count, pgoff)
    good = count >= 1 and pgoff + count <= npages and length == count * 4096
    try:
        wire.check_pages(header, "a", npages, 4096)
        assert good
    except ProtocolError:
        assert not good


@given(u32 | st.integers(0, 80), u64, st.integers(1, SIZE), st.integers(0, wire.MAX_PACKED))
def test_compressed_pages_are_within_area_and_bounds_or_refused(
    count: int, pgoff: int, npages: int, length: int
) -> None:
    raw = wire.pack_packed(5, pgoff, count, length)
    header = wire.unpack(raw)
    assert header == Header(Kind.PACKED, length, 5, count, pgoff)
    good = 1 <= count <= 64 and pgoff + count <= npages and 0 < length < count * 4096
    try:
        wire.check_packed(header, "a", npages, 4096)
        assert good
    except ProtocolError as e:
        assert not good and "area a" in str(e)


@given(
    st.lists(st.tuples(u64 | st.integers(0, 90), u64 | st.integers(0, 70)), max_size=66),
    st.integers(1, 100),
    st.integers(0, wire.MAX_LENGTH[Kind.SCATTERED]) | st.none(),
)
def test_scattered_pages_are_within_area_and_bounds_or_refused(
    ranges: list[tuple[int, int]], npages: int, length: int | None
) -> None:
    pages = sum(count for _, count in ranges)
    expected = 16 * len(ranges) + 4096 * pages
    length = min(expected, wire.MAX_LENGTH[Kind.SCATTERED]) if length is None else length
    inside = all(count >= 1 and pgoff + count <= npages for pgoff, count in ranges)
    good = 1 <= len(ranges) <= 64 and inside and pages <= 64 and length == expected
    header = Header(Kind.SCATTERED, length, 5, len(ranges), 0)
    raw = struct.pack(f"!{2 * len(ranges)}Q", *(word for one in ranges for word in one))
    try:
        assert wire.scattered_ranges_size(header, "a") == len(raw)
        assert wire.unpack_scattered(header, raw, "a", npages, 4096) == ranges
        assert good
    except ProtocolError as e:
        assert not good and "area a" in str(e)
    if good:
        packed = wire.pack_scattered(5, ranges, 4096)
        assert wire.unpack(packed) == header and packed[24:] == raw


@given(st.binary(max_size=200), u32)
def test_payloads_of_a_wrong_length_are_refused(payload: bytes, count: int) -> None:
    for kind, size in ((Kind.REQUEST, 8), (Kind.ZERO, 16)):
        if len(payload) == count * size and count:
            continue
        header = Header(kind, len(payload), 0, count, 0)
        with pytest.raises(ProtocolError):
            if kind is Kind.ZERO:
                wire.unpack_ranges(header, payload, "a", SIZE)
            else:
                wire.unpack_offsets(header, payload, "a", SIZE)


def test_too_many_in_one_frame_is_our_own_mistake() -> None:
    with pytest.raises(ValueError, match="4097"):
        wire.pack_offsets(Kind.REQUEST, 0, [0] * 4097)
    with pytest.raises(ValueError, match="4097"):
        wire.pack_ranges(0, [(0, 1)] * 4097)
    with pytest.raises(ValueError):
        wire.pack_offsets(Kind.REQUEST, 0, [])
    for ranges in ([(0, 65)], [(2 * n, 1) for n in range(65)], []):
        with pytest.raises(ValueError, match="in one SCATTERED"):
            wire.pack_scattered(0, ranges, 4096)


# --- JSON ---

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda s: st.lists(s, max_size=3)
)


@given(st.dictionaries(st.text(max_size=10), values, max_size=5))
def test_json_comes_back(message: dict[str, object]) -> None:
    raw = wire.pack_json(Kind.COMPLETE, message)
    assert wire.unpack_json(Kind.COMPLETE, raw[24:]) == json.loads(json.dumps(message))


@pytest.mark.parametrize("payload", [b"", b"[1]", b"3", b"{", b"\xff\xff", b"[" * 60000, b"null"])
def test_json_that_is_none(payload: bytes) -> None:
    with pytest.raises(ProtocolError, match="HELLO"):
        wire.unpack_json(Kind.HELLO, payload)


def test_json_above_its_bound_is_our_own_mistake() -> None:
    with pytest.raises(ValueError, match="REFUSE"):
        wire.pack_json(Kind.REFUSE, {"reason": "x" * 70000})
