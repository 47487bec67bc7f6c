# SPDX-License-Identifier: GPL-2.0-or-later
"""Connections as the two daemons see them: frames over asyncio, and the greeting that every lane
begins with.

After the greeting a page lane's socket is detached and handed to a worker; nothing is read ahead,
so not a byte is lost. The control lane stays here.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
from typing import Any, Final

import pyumem
from pyumem import hello as messages
from pyumem import wire
from pyumem.address import Address, name_of
from pyumem.errors import ForeignPeerError, LinkError, ProtocolError, RefusedError
from pyumem.hello import MAC_SIZE, NONCE_SIZE, Challenge, Hello
from pyumem.lanes.link import tune
from pyumem.wire import Kind

GREETING_S: Final = 5.0
"""Seconds in which a peer has to prove itself."""
WELCOME_S: Final = 60.0
"""Seconds that the source waits for WELCOME: the destination starts a process for each lane first.
"""
CONNECT_S: Final = 10.0


def software() -> str:
    """Return what this side calls itself."""
    return f"umem {pyumem.__version__} on {os.uname().nodename}"[:256]


class AsyncLink:
    """A connection that speaks frames.  Owns the socket until detach()."""

    def __init__(self, sock: socket.socket, peer: str) -> None:
        """Own the socket from now on."""
        sock.setblocking(False)
        self._sock = sock
        self._detached = False
        self._torn = False
        self.heard = 0
        """Counts what was received: it changes while the peer is heard of."""
        self.peer: Final = peer
        self._sending = asyncio.Lock()

    @classmethod
    async def connect(cls, address: Address) -> AsyncLink:
        """Connect to the first of the host's addresses that answers.  Raises LinkError."""
        loop = asyncio.get_running_loop()
        problem: str = "no address found"
        try:
            infos = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
        except OSError as e:
            raise LinkError(f"{address}: {e.strerror or e}") from e
        for family, kind, proto, _, at in infos:
            sock = socket.socket(family, kind | socket.SOCK_CLOEXEC, proto)
            sock.setblocking(False)
            try:
                async with asyncio.timeout(CONNECT_S):
                    await loop.sock_connect(sock, at)
                tune(sock)
                return cls(sock, name_of(at))
            except TimeoutError:
                problem = f"no answer within {CONNECT_S:g} s"
                sock.close()
            except OSError as e:
                # asyncio's own text for it has no reason in it.
                problem = os.strerror(e.errno) if e.errno else str(e)
                sock.close()
            except BaseException:
                sock.close()
                raise
        raise LinkError(f"cannot connect to {address}: {problem}")

    # --- receiving ---

    async def _fill(self, view: memoryview) -> int:
        loop = asyncio.get_running_loop()
        done = 0
        try:
            while done < len(view):
                got = await loop.sock_recv_into(self._sock, view[done:])
                if not got:
                    break
                done += got
                self.heard += 1
        except OSError as e:
            raise LinkError(f"{self.peer}: {e.strerror or e}") from e
        return done

    async def receive(self, only: Kind | None = None) -> tuple[wire.Header, memoryview] | None:
        """Return the next frame, None when the peer closed the connection between two frames.

        Of a frame of another kind than `only` no payload is read.  Raises LinkError, and
        ProtocolError that names the peer.
        """
        # What is there already comes without a wait: others get their turn all the same.
        await asyncio.sleep(0)
        raw = memoryview(bytearray(wire.HEADER_SIZE))
        try:
            if not (done := await self._fill(raw[: wire.PREFIX_SIZE])):
                return None
            if done == wire.PREFIX_SIZE:
                # A foreign peer may never send a whole header.
                wire.check_prefix(raw)
                done += await self._fill(raw[wire.PREFIX_SIZE :])
            if done < wire.HEADER_SIZE:
                raise LinkError(f"{self.peer}: connection closed within a header")
            header = wire.unpack(raw)
            if only is not None and header.kind is not only:
                raise ProtocolError(f"began with {header.kind.name} instead of {only.name}")
        except ProtocolError as e:
            raise type(e)(f"{self.peer}: {e}") from None
        payload = memoryview(bytearray(header.length))
        if await self._fill(payload) < header.length:
            raise LinkError(f"{self.peer}: connection closed within a {header.kind.name} frame")
        return header, payload

    # --- sending ---

    async def send(self, *parts: bytes | memoryview) -> None:
        """Send a frame.  Raises LinkError."""
        loop = asyncio.get_running_loop()
        async with self._sending:
            if self._torn:
                raise LinkError(f"{self.peer}: an earlier frame was cut off")
            # What follows half a frame would be taken for its rest.
            self._torn = True
            try:
                for part in parts:
                    await loop.sock_sendall(self._sock, part)
                self._torn = False
            except OSError as e:
                raise LinkError(f"{self.peer}: {e.strerror or e}") from e

    async def send_json(self, kind: Kind, message: dict[str, Any]) -> None:
        """Send a JSON frame.  Raises LinkError."""
        await self.send(wire.pack_json(kind, message))

    # --- the end ---

    def tune(self, *, control: bool) -> None:
        """Set the socket's options for what it turned out to be."""
        tune(self._sock, control=control)

    def detach(self) -> socket.socket:
        """Give the socket to the caller."""
        self._detached = True
        return self._sock

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close the connection, unless it was detached; again is harmless."""
        if self._detached:
            return
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


# --- destination ---


async def admit(link: AsyncLink, token: bytes) -> Hello:
    """Greet whoever connected and return its HELLO once it proved that it has the token.

    Raises ProtocolError, LinkError, or RefusedError (the peer was told).
    """
    nonce = secrets.token_hex(NONCE_SIZE)
    try:
        async with asyncio.timeout(GREETING_S):
            await link.send_json(Kind.CHALLENGE, Challenge(nonce, software()).to_json())
            frame = await link.receive(only=Kind.HELLO)
    except TimeoutError:
        raise ProtocolError(f"{link.peer}: said nothing valid within {GREETING_S:g} s") from None
    if frame is None:
        raise LinkError(f"{link.peer}: left without a word")
    header, payload = frame
    if header.length < MAC_SIZE:
        raise ProtocolError(f"{link.peer}: began with HELLO too short for a proof")
    given, text = bytes(payload[:MAC_SIZE]), bytes(payload[MAC_SIZE:])
    if not messages.proven(messages.mac(token, "source", nonce, text), given):
        reason = "the tokens of the two hosts differ (see --token-file)"
        await refuse(link, reason)
        raise RefusedError(f"{link.peer}: {reason}")
    try:
        return Hello.from_json(wire.unpack_json(Kind.HELLO, text))
    except ProtocolError as e:
        await refuse(link, f"malformed HELLO: {e}")
        raise ProtocolError(f"{link.peer}: malformed HELLO: {e}") from None


async def refuse(link: AsyncLink, reason: str) -> None:
    """Tell the peer why not.  It may be gone: that is not our problem any more."""
    with contextlib.suppress(LinkError, TimeoutError):
        async with asyncio.timeout(GREETING_S):
            await link.send_json(Kind.REFUSE, {"reason": reason[:2000]})


async def welcome(link: AsyncLink, token: bytes, hello: Hello) -> None:
    """Answer a HELLO, proving that this side has the token too.  Raises LinkError."""
    frame = wire.pack_json(Kind.WELCOME, {"software": software()})
    text = frame[wire.HEADER_SIZE :]
    proof = messages.mac(token, "destination", hello.nonce, text)
    await link.send(wire.pack(Kind.WELCOME, len(proof) + len(text)) + proof + text)


# --- source ---


async def introduce(link: AsyncLink, token: bytes, hello: Hello) -> None:
    """Answer the destination's CHALLENGE and wait until it says WELCOME.

    Raises RefusedError with its reason, ProtocolError, LinkError.
    """
    try:
        async with asyncio.timeout(GREETING_S):
            frame = await link.receive()
    except TimeoutError:
        raise ForeignPeerError(
            f"{link.peer}: did not greet within {GREETING_S:g} s; is it `umemctl serve` with a VM "
            "started by `umem-qemu ... -postcopy -incoming`?"
        ) from None
    challenge = Challenge.from_json(_expect(link, frame, Kind.CHALLENGE))
    text = wire.pack_json(Kind.HELLO, hello.to_json())[wire.HEADER_SIZE :]
    proof = messages.mac(token, "source", challenge.nonce, text)
    await link.send(wire.pack(Kind.HELLO, len(proof) + len(text)) + proof + text)
    try:
        async with asyncio.timeout(WELCOME_S):
            frame = await link.receive()
    except TimeoutError:
        raise LinkError(f"{link.peer}: no answer to HELLO within {WELCOME_S:g} s") from None
    if frame is not None and frame[0].kind is Kind.WELCOME:
        given, text = bytes(frame[1][:MAC_SIZE]), bytes(frame[1][MAC_SIZE:])
        if not messages.proven(messages.mac(token, "destination", hello.nonce, text), given):
            raise RefusedError(f"{link.peer}: the destination does not have this host's token")
        return
    _expect(link, frame, Kind.WELCOME)


def _expect(
    link: AsyncLink, frame: tuple[wire.Header, memoryview] | None, kind: Kind
) -> dict[str, Any]:
    """Return the JSON of a frame of this kind.  A REFUSE in its place raises RefusedError."""
    if frame is None:
        raise LinkError(f"{link.peer}: closed the connection instead of {kind.name}")
    header, payload = frame
    if header.kind is Kind.REFUSE:
        reason = wire.unpack_json(Kind.REFUSE, payload).get("reason")
        raise RefusedError(f"refused by {link.peer}: {reason}")
    if header.kind is not kind:
        raise ProtocolError(f"{link.peer}: {header.kind.name} instead of {kind.name}")
    return wire.unpack_json(kind, payload)
