# SPDX-License-Identifier: GPL-2.0-or-later
"""The greeting over socket pairs: both sides know at the end, and both sides say what is wrong."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from pyumem import greeting, wire
from pyumem.address import Address
from pyumem.errors import (
    ForeignPeerError,
    LinkError,
    ProtocolError,
    RefusedError,
    UmemError,
    VersionError,
)
from pyumem.greeting import AsyncLink, admit, introduce, refuse, welcome
from pyumem.hello import AreaSpec, Hello, Lane
from pyumem.tls import Security
from pyumem.wire import Kind

HELLO = Hello(
    lane=Lane.CONTROL,
    session="0" * 32,
    vm="vm1",
    nonce="ab" * 32,
    software="umem 0",
    areas=(AreaSpec("ram0", 1 << 30, 4096),),
)


def links() -> tuple[AsyncLink, AsyncLink]:
    one, two = socket.socketpair()
    return AsyncLink(one, "the source"), AsyncLink(two, "the destination")


async def both(
    source: Callable[[AsyncLink], Awaitable[Any]],
    destination: Callable[[AsyncLink], Awaitable[Any]],
) -> tuple[Any, Any]:
    """Run both sides; each result may be an exception.  A side that ends in one closes."""
    at_destination, at_source = links()

    async def side(link: AsyncLink, work: Callable[[AsyncLink], Awaitable[Any]]) -> object:
        try:
            return await work(link)
        except UmemError as e:
            link.close()
            return e

    results = await asyncio.gather(side(at_source, source), side(at_destination, destination))
    at_source.close()
    at_destination.close()
    return results[0], results[1]


def run(
    source: Callable[[AsyncLink], Awaitable[Any]],
    destination: Callable[[AsyncLink], Awaitable[Any]],
) -> tuple[Any, Any]:
    return asyncio.run(both(source, destination))


@pytest.mark.parametrize("token", [b"", b"secret"])
def test_welcome(token: bytes) -> None:
    async def destination(link: AsyncLink) -> Hello:
        hello = await admit(link, Security(token))
        await welcome(link, token, hello, compression="zstd")
        return hello

    told, heard = run(lambda link: introduce(link, token, HELLO), destination)
    assert heard == HELLO and told.compression == "zstd"


@pytest.mark.parametrize(("here", "there"), [(b"a", b"b"), (b"", b"b"), (b"a", b"")])
def test_a_wrong_token_is_told_on_both_sides(here: bytes, there: bytes) -> None:
    source, destination = run(
        lambda link: introduce(link, here, HELLO), lambda link: admit(link, Security(there))
    )
    assert isinstance(source, RefusedError) and "tokens of the two hosts differ" in str(source)
    assert isinstance(destination, RefusedError) and "tokens" in str(destination)


def test_a_destination_that_only_pretends() -> None:
    async def destination(link: AsyncLink) -> None:
        hello = await admit(link, Security(b"secret"))
        await welcome(link, b"guess", hello)

    source, _ = run(lambda link: introduce(link, b"secret", HELLO), destination)
    assert isinstance(source, RefusedError) and "does not have this host's token" in str(source)


def test_a_refusal_arrives_with_its_reason() -> None:
    async def destination(link: AsyncLink) -> None:
        await admit(link, Security())
        await refuse(link, "RAM block ram0 has 1 bytes here")

    source, _ = run(lambda link: introduce(link, b"", HELLO), destination)
    assert isinstance(source, RefusedError)
    assert "the destination: RAM block ram0 has 1 bytes here" in str(source)
    assert source.exit_status == 3


def with_version(frame: bytes, version: int) -> bytes:
    return frame[:2] + bytes([version]) + frame[3:]


def test_another_version_is_told_on_both_sides() -> None:
    async def newer_source(link: AsyncLink) -> None:
        await link.receive()
        await link.send(with_version(wire.pack_json(Kind.HELLO, {}), 9))

    _, destination = run(newer_source, lambda link: admit(link, Security()))
    assert isinstance(destination, VersionError)
    assert "the source: the peer speaks version 9" in str(destination)

    async def newer_destination(link: AsyncLink) -> None:
        await link.send(with_version(wire.pack_json(Kind.CHALLENGE, {}), 9))

    source, _ = run(lambda link: introduce(link, b"", HELLO), newer_destination)
    assert isinstance(source, VersionError) and "version 9" in str(source)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"QEVM\x00\x00\x00\x03" + bytes(100), "QEMU's own migration stream"),
        (b"QEVM\x00\x00\x00\x03", "QEMU's own migration stream"),
        (b"GET / HTTP/1.1\r\n\r\n", "an HTTP client"),
        (b"\x00" * 30, "not umem's protocol"),
        (wire.pack(Kind.BYE), "began with BYE instead of HELLO"),
        (wire.pack(Kind.HELLO, 10) + bytes(10), "began with HELLO"),
        (wire.pack(Kind.HELLO, wire.MAX_JSON)[:23], "closed within a header"),
        (wire.pack(Kind.HELLO, 100) + bytes(50), "closed within a HELLO"),
        (wire.pack(Kind.DEVICE, wire.MAX_DEVICE + 1), "at most"),
        (b"", "left without a word"),
    ],
)
def test_garbage_is_answered_with_its_name(data: bytes, what: str) -> None:
    async def stranger(link: AsyncLink) -> None:
        await link.send(data)
        sock = link.detach()
        sock.shutdown(socket.SHUT_WR)
        await asyncio.sleep(0.05)
        sock.close()

    _, destination = run(stranger, lambda link: admit(link, Security()))
    assert isinstance(destination, ProtocolError | LinkError), destination
    assert what in str(destination) and "the source" in str(destination)


def test_a_malformed_hello_is_told() -> None:
    from pyumem import hello as messages

    async def source(link: AsyncLink) -> dict[str, Any]:
        frame = await link.receive()
        assert frame is not None
        nonce = wire.unpack_json(Kind.CHALLENGE, frame[1])["nonce"]
        text = b'{"lane":"spare"}'
        proof = messages.mac(b"", "source", nonce, text)
        await link.send(wire.pack(Kind.HELLO, len(proof + text)) + proof + text)
        frame = await link.receive()
        assert frame is not None and frame[0].kind is Kind.REFUSE
        return wire.unpack_json(Kind.REFUSE, frame[1])

    told, destination = run(source, lambda link: admit(link, Security()))
    assert "unknown lane" in told["reason"] and "unknown lane" in str(destination)


def test_silence_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greeting, "GREETING_S", 0.1)

    async def mute(_link: AsyncLink) -> None:
        await asyncio.sleep(0.5)

    _, destination = run(mute, lambda link: admit(link, Security()))
    assert isinstance(destination, ProtocolError) and "nothing valid within" in str(destination)
    source, _ = run(lambda link: introduce(link, b"", HELLO), mute)
    assert isinstance(source, ForeignPeerError) and "umemctl serve" in str(source)


def test_a_peer_that_sends_byte_by_byte_has_no_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greeting, "GREETING_S", 0.2)

    async def slow(link: AsyncLink) -> None:
        for byte in wire.pack_json(Kind.HELLO, {"x": "y" * 1000}):
            await link.send(bytes([byte]))
            await asyncio.sleep(0.01)

    _, destination = run(slow, lambda link: admit(link, Security()))
    assert isinstance(destination, ProtocolError)


def test_connecting_to_nobody() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    with pytest.raises(LinkError, match=f"tcp:127.0.0.1:{port}: Connection refused"):
        asyncio.run(AsyncLink.connect(Address("127.0.0.1", port)))
