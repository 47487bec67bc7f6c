# SPDX-License-Identifier: GPL-2.0-or-later
"""A lane's socket as a worker sees it: blocking, framed, counting; page data goes between the
socket and memory of the caller's, at the source the RAM itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
import termios
from typing import Any, Final

from pyumem import wire
from pyumem.errors import LinkError, ProtocolError
from pyumem.stats import Counter, StatsBlock

DEAD_PEER_S: Final = 300
"""Seconds without progress after which a lane is given up by itself.  Long: before the commit a
network that comes back after a minute, or a peer that swaps, has lost nothing; after it the
heartbeat of the control lane is the judge (pyumem.heartbeat).
"""
BACKGROUND_LOWAT: Final = 64 * 1024
"""Unsent bytes of a background lane above which its sender sleeps."""
_URGENT_PRIORITY: Final = 6
"""SO_PRIORITY of urgent lanes: the first band of pfifo_fast and of prio, the most that needs no
privilege.
"""


CONTROL_SNDBUF: Final = 64 * 1024
"""Send buffer of a control lane in bytes: what an ABORT may find ahead of it."""


def tune(
    sock: socket.socket, *, urgent: bool = False, background: bool = False, control: bool = False
) -> None:
    """Set what every lane needs: small frames at once, a dead peer noticed in bounded time."""
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        tcp = socket.IPPROTO_TCP
        sock.setsockopt(tcp, socket.TCP_NODELAY, 1)
        sock.setsockopt(tcp, socket.TCP_USER_TIMEOUT, DEAD_PEER_S * 1000)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(tcp, socket.TCP_KEEPIDLE, DEAD_PEER_S // 3)
        sock.setsockopt(tcp, socket.TCP_KEEPINTVL, DEAD_PEER_S // 6)
        sock.setsockopt(tcp, socket.TCP_KEEPCNT, 4)
        if background:
            sock.setsockopt(tcp, socket.TCP_NOTSENT_LOWAT, BACKGROUND_LOWAT)
    if urgent:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, _URGENT_PRIORITY)
    if control:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, CONTROL_SNDBUF)


class Link:
    """One lane.  Owns the socket."""

    def __init__(self, sock: socket.socket, peer: str, stats: StatsBlock) -> None:
        """Own the socket from now on."""
        sock.setblocking(True)
        self.sock = sock
        self.peer: Final = peer
        self._stats = stats
        self._header = memoryview(bytearray(wire.HEADER_SIZE))

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self.sock.fileno()

    # --- receiving ---

    def receive_into(self, view: memoryview) -> None:
        """Fill the view.  Raises LinkError when the peer goes away before that."""
        done = self._fill(view)
        if done < len(view):
            raise LinkError(
                f"{self.peer}: connection closed within a frame ({done} of {len(view)} bytes)"
            )

    def _fill(self, view: memoryview) -> int:
        done = 0
        try:
            while done < len(view):
                got = self.sock.recv_into(view[done:], 0, socket.MSG_WAITALL)
                if not got:
                    break
                done += got
        except OSError as e:
            raise LinkError(f"{self.peer}: {e.strerror}") from e
        self._stats.add(Counter.BYTES_RECEIVED, done)
        return done

    def header(self) -> wire.Header | None:
        """Return the next header, None when the peer closed the connection between two frames.

        Raises LinkError and ProtocolError.
        """
        done = self._fill(self._header)
        if not done:
            return None
        if done < wire.HEADER_SIZE:
            raise LinkError(f"{self.peer}: connection closed within a header")
        try:
            return wire.unpack(self._header)
        except ProtocolError as e:
            raise type(e)(f"{self.peer}: {e}") from None

    def pending(self) -> bool:
        """Tell whether something was received already that poll() does not see."""
        return False

    def payload(self, header: wire.Header) -> memoryview:
        """Return the payload of a small frame.  Pages are received by receive_into() instead."""
        view = memoryview(bytearray(header.length))
        self.receive_into(view)
        return view

    # --- sending ---

    def send(self, *parts: bytes | memoryview) -> None:
        """Send all of it, in one system call when the socket takes it.  Raises LinkError."""
        total = sum(len(part) for part in parts)
        try:
            sent = self.sock.sendmsg(parts)
            while sent < total:
                # Rare: a signal, or a socket buffer that was nearly full.
                rest = []
                skip = sent
                for part in parts:
                    if skip < len(part):
                        rest.append(memoryview(part)[skip:])
                        skip = 0
                    else:
                        skip -= len(part)
                sent += self.sock.sendmsg(rest)
        except OSError as e:
            raise LinkError(f"{self.peer}: {e.strerror}") from e
        self._stats.add(Counter.BYTES_SENT, total)

    def send_some(self, data: bytearray) -> int:
        """Send what fits now, return how much.  The rest has to be offered again, unchanged, with
        more behind it or not.  Raises LinkError.
        """
        try:
            sent = self.sock.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError as e:
            raise LinkError(f"{self.peer}: {e.strerror}") from e
        self._stats.add(Counter.BYTES_SENT, sent)
        return sent

    def untaken(self) -> int:
        """Return how many bytes that were sent the peer's kernel has not acknowledged."""
        answer = fcntl.ioctl(self.sock, termios.TIOCOUTQ, struct.pack("i", 0))
        return int(struct.unpack("i", answer)[0])

    def hang_up(self) -> None:
        """End the connection for both sides; again is harmless."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection; again is harmless."""
        self.hang_up()
        self.sock.close()


def make_link(sock: socket.socket, message: dict[str, Any], stats: StatsBlock) -> Link:
    """Return the link of a worker, as its start message wants it; under TLS after the handshake.

    Raises LinkError, RefusedError, UsageError.
    """
    if message["tls"] is None:
        return Link(sock, message["peer"], stats)
    # Costs a worker time and memory that most do not need.
    from pyumem.lanes.tls_link import TlsLink
    from pyumem.tls import LaneTls

    return TlsLink(sock, message["peer"], stats, LaneTls.from_json(message["tls"]))
