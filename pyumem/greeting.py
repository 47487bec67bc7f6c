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
import ssl
from collections.abc import Callable
from typing import Any, Final

import pyumem
from pyumem import hello as messages
from pyumem import wire
from pyumem.address import Address, name_of
from pyumem.errors import ForeignPeerError, LinkError, ProtocolError, RefusedError
from pyumem.hello import MAC_SIZE, NONCE_SIZE, Challenge, Hello, Lane, Welcome
from pyumem.lanes.link import tune
from pyumem.tls import LaneSecurity, LaneTls, Security, fingerprint, trouble
from pyumem.wire import Kind

GREETING_S: Final = 5.0
"""Seconds in which a peer has to prove itself."""
WELCOME_S: Final = 60.0
"""Seconds that the source waits for WELCOME: the destination starts a process for each lane first.
"""
CONNECT_S: Final = 10.0
_RAW: Final = 64 * 1024
"""Bytes that are read off a socket under TLS at a time."""


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
        self._tls: ssl.SSLObject | None = None
        self._tls_in = ssl.MemoryBIO()
        self._tls_out = ssl.MemoryBIO()
        self.fingerprint = ""
        """Of the peer's certificate, under TLS."""

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
        done = 0
        try:
            while done < len(view):
                got = await self._receive_some(view[done:])
                if not got:
                    break
                done += got
                self.heard += 1
        except OSError as e:
            raise trouble(self.peer, e) from e
        return done

    async def _receive_some(self, view: memoryview) -> int:
        """Return how many bytes came, 0 at the end."""
        loop = asyncio.get_running_loop()
        if self._tls is None:
            return await loop.sock_recv_into(self._sock, view)
        while True:
            try:
                return self._tls.read(len(view), view)  # type: ignore[return-value]
            except ssl.SSLWantReadError:
                await self._receive_raw()
            except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
                return 0  # cut off or not: a frame says how long it is

    async def _receive_raw(self) -> None:
        raw = await asyncio.get_running_loop().sock_recv(self._sock, _RAW)
        if raw:
            self._tls_in.write(raw)
        else:
            self._tls_in.write_eof()

    async def receive(self, *only: Kind) -> tuple[wire.Header, memoryview] | None:
        """Return the next frame, None when the peer closed the connection between two frames.

        Of a frame of another kind than `only`, if given, no payload is read.  Raises LinkError, and
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
            if only and header.kind not in only:
                raise ProtocolError(
                    f"began with {header.kind.name} instead of {' or '.join(k.name for k in only)}"
                )
        except ProtocolError as e:
            raise type(e)(f"{self.peer}: {e}") from None
        payload = memoryview(bytearray(header.length))
        if await self._fill(payload) < header.length:
            raise LinkError(f"{self.peer}: connection closed within a {header.kind.name} frame")
        return header, payload

    # --- sending ---

    async def send(self, *parts: bytes | memoryview) -> None:
        """Send a frame.  Raises LinkError."""
        async with self._sending:
            if self._torn:
                raise LinkError(f"{self.peer}: an earlier frame was cut off")
            # What follows half a frame would be taken for its rest.
            self._torn = True
            try:
                for part in parts:
                    await self._send_all(part)
                self._torn = False
            except OSError as e:
                raise trouble(self.peer, e) from e

    async def _send_all(self, part: bytes | memoryview) -> None:
        if self._tls is not None:
            self._tls.write(part)
            part = self._tls_out.read()
        await asyncio.get_running_loop().sock_sendall(self._sock, part)

    async def send_json(self, kind: Kind, message: dict[str, Any]) -> None:
        """Send a JSON frame.  Raises LinkError."""
        await self.send(wire.pack_json(kind, message))

    # --- TLS ---

    async def start_tls(self, context: ssl.SSLContext, *, hostname: str = "") -> None:
        """Go on under TLS; as the server when there is no hostname that the peer has to have.

        Raises LinkError, and RefusedError for a certificate.
        """
        tls = context.wrap_bio(
            self._tls_in,
            self._tls_out,
            server_side=not hostname,
            server_hostname=hostname or None,
        )
        loop = asyncio.get_running_loop()
        try:
            while True:
                try:
                    tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    await loop.sock_sendall(self._sock, self._tls_out.read())
                    await self._receive_raw()
                except ssl.SSLError:
                    # The alert that tells the peer why.
                    await loop.sock_sendall(self._sock, self._tls_out.read())
                    raise
            await loop.sock_sendall(self._sock, self._tls_out.read())
        except OSError as e:
            raise trouble(self.peer, e) from e
        self._tls, self.fingerprint = tls, fingerprint(tls)

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

    def hang_up(self) -> None:
        """End the connection for both sides; whoever receives on it sees that."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection, unless it was detached; again is harmless."""
        if self._detached:
            return
        self.hang_up()
        self._sock.close()


# --- destination ---


async def admit(
    link: AsyncLink, security: Security, lane_token: Callable[[], bytes | None] = lambda: None
) -> Hello:
    """Greet whoever connected and return its HELLO once it proved that it has the token.

    lane_token: what page lanes prove, None while none is expected; without TLS it is the token of
    all lanes.  Raises ProtocolError, LinkError, UsageError (our certificate), or RefusedError (the
    peer was told).
    """
    try:
        async with asyncio.timeout(GREETING_S):
            return await _admit(link, security, lane_token)
    except TimeoutError:
        raise ProtocolError(f"{link.peer}: said nothing valid within {GREETING_S:g} s") from None


async def _admit(
    link: AsyncLink, security: Security, lane_token: Callable[[], bytes | None]
) -> Hello:
    if security.credentials is None:
        hello = await _hello(link, lambda: security.token, software(), Kind.HELLO)
        assert hello is not None
        return hello
    context = security.credentials.server_context()
    hello = await _hello(link, lane_token, "", Kind.STARTTLS, Kind.HELLO)
    if hello is None:
        await link.start_tls(context)
        hello = await _hello(link, lambda: security.token, software(), Kind.HELLO)
        assert hello is not None
    if bool(link.fingerprint) != (hello.lane is Lane.CONTROL):
        reason = f"a {hello.lane} lane has to come {'in clear' if link.fingerprint else 'with TLS'}"
        await refuse(link, reason)
        raise RefusedError(f"{link.peer}: {reason}")
    return hello


async def _hello(
    link: AsyncLink, token: Callable[[], bytes | None], name: str, *kinds: Kind
) -> Hello | None:
    """Send a CHALLENGE and return the HELLO that answers it, None for a STARTTLS."""
    nonce = secrets.token_hex(NONCE_SIZE)
    tls = Kind.STARTTLS in kinds
    await link.send_json(Kind.CHALLENGE, Challenge(nonce, name, tls).to_json())
    frame = await link.receive(*kinds)
    if frame is None:
        raise LinkError(f"{link.peer}: left without a word")
    header, payload = frame
    if header.kind is Kind.STARTTLS:
        return None
    if header.length < MAC_SIZE:
        raise ProtocolError(f"{link.peer}: began with HELLO too short for a proof")
    given, text = bytes(payload[:MAC_SIZE]), bytes(payload[MAC_SIZE:])
    key = token()
    if key is None or not messages.proven(messages.mac(key, "source", nonce, text), given):
        reason = "the tokens of the two hosts differ (see --token-file)"
        if tls:
            reason = "TLS is wanted here, or no such migration is known"
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


def lane_security(link: AsyncLink, security: Security) -> LaneSecurity:
    """Return what the page lanes of a migration whose control lane this is are to prove.

    Under TLS they come in clear, so that a worker can do the handshake, and with a secret of their
    own.
    """
    if security.credentials is None:
        return LaneSecurity(security.token)
    tls = LaneTls(security.credentials.directory, True, "", link.fingerprint)
    return LaneSecurity(secrets.token_hex(NONCE_SIZE).encode(), tls)


async def welcome(
    link: AsyncLink,
    token: bytes,
    hello: Hello,
    lanes: LaneSecurity | None = None,
    *,
    compression: str = "",
) -> None:
    """Answer a HELLO, proving that this side has the token too; on a control lane tell what its
    page lanes are to prove, on a background lane how pages may be compressed.  Raises LinkError.
    """
    secret = lanes.token.decode() if lanes and lanes.tls else ""
    frame = wire.pack_json(Kind.WELCOME, Welcome(software(), secret, compression).to_json())
    text = frame[wire.HEADER_SIZE :]
    proof = messages.mac(token, "destination", hello.nonce, text)
    await link.send(wire.pack(Kind.WELCOME, len(proof) + len(text)) + proof + text)


# --- source ---


async def introduce_control(
    link: AsyncLink, security: Security, hello: Hello, host: str
) -> LaneSecurity:
    """Answer the destination's CHALLENGE, under TLS if this side has credentials, and wait until it
    says WELCOME.  host: what it was reached by.

    Returns what page lanes are to prove.  Raises RefusedError with its reason, ProtocolError,
    LinkError, UsageError (our certificate).
    """
    challenge = await _challenge(link)
    credentials = security.credentials
    if credentials is None:
        if challenge.tls:
            raise RefusedError(f"{link.peer} wants TLS: give --tls-creds DIR")
        await _introduce(link, challenge, security.token, hello)
        return LaneSecurity(security.token)
    if not challenge.tls:
        raise RefusedError(
            f"{link.peer} has no TLS: start its `umemctl serve` with --tls-creds DIR, or migrate "
            "with --insecure"
        )
    hostname = security.tls_hostname or host
    await link.send(wire.pack(Kind.STARTTLS))
    try:
        async with asyncio.timeout(GREETING_S):
            await link.start_tls(credentials.client_context(), hostname=hostname)
    except TimeoutError:
        raise LinkError(f"{link.peer}: no TLS handshake within {GREETING_S:g} s") from None
    answer = await _introduce(link, await _challenge(link), security.token, hello)
    return LaneSecurity(
        answer.lane_secret.encode(),
        LaneTls(credentials.directory, False, hostname, link.fingerprint),
    )


async def introduce(link: AsyncLink, token: bytes, hello: Hello) -> Welcome:
    """Answer the destination's CHALLENGE on a page lane and return its WELCOME.

    Raises RefusedError with its reason, ProtocolError, LinkError.
    """
    return await _introduce(link, await _challenge(link), token, hello)


async def _challenge(link: AsyncLink) -> Challenge:
    try:
        async with asyncio.timeout(GREETING_S):
            frame = await link.receive()
    except TimeoutError:
        raise ForeignPeerError(
            f"{link.peer}: did not greet within {GREETING_S:g} s; is it `umemctl serve` with a VM "
            "started by `umem-qemu ... -postcopy -incoming`?"
        ) from None
    return Challenge.from_json(_expect(link, frame, Kind.CHALLENGE))


async def _introduce(link: AsyncLink, challenge: Challenge, token: bytes, hello: Hello) -> Welcome:
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
        return Welcome.from_json(wire.unpack_json(Kind.WELCOME, text))
    return Welcome.from_json(_expect(link, frame, Kind.WELCOME))


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
