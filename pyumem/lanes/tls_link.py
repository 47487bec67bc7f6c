# SPDX-License-Identifier: GPL-2.0-or-later
"""A page lane under TLS.  The worker that owns the socket does the handshake itself.

OpenSSL is told not to block, and poll() waits in its place: that way a lane that wants to write
nothing that does not fit (send_some) and one that waits are the same connection.
"""

from __future__ import annotations

import select
import socket
import ssl
import time
from typing import Final

from pyumem.errors import LinkError, RefusedError
from pyumem.lanes.link import Link
from pyumem.stats import Counter, StatsBlock
from pyumem.tls import Credentials, LaneTls, fingerprint, trouble

HANDSHAKE_S: Final = 20.0
_RECORD: Final = 16 * 1024
"""Bytes of payload that fit into one TLS record (RFC 8446, 5.1)."""


class TlsLink(Link):
    """A lane's link under TLS."""

    def __init__(self, sock: socket.socket, peer: str, stats: StatsBlock, tls: LaneTls) -> None:
        """Own the socket from now on and shake hands.

        Raises LinkError, UsageError, and RefusedError for a certificate that is none of ours or not
        the control lane's.
        """
        super().__init__(sock, peer, stats)
        credentials = Credentials(tls.directory)
        context = credentials.server_context() if tls.server_side else credentials.client_context()
        sock.setblocking(False)
        self._first = memoryview(bytearray(_RECORD))
        try:
            self._tls = context.wrap_socket(
                sock,
                server_side=tls.server_side,
                server_hostname=tls.hostname or None,
                do_handshake_on_connect=False,
                suppress_ragged_eofs=True,
            )
        except OSError as e:
            raise trouble(peer, e) from e
        self.sock = self._tls
        self._poll = select.poll()
        self._poll.register(self._tls, 0)
        self._shake_hands(tls.peer)

    def _shake_hands(self, wanted: str) -> None:
        deadline = time.monotonic() + HANDSHAKE_S
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self._wait(select.POLLIN, deadline)
            except ssl.SSLWantWriteError:
                self._wait(select.POLLOUT, deadline)
            except OSError as e:
                raise trouble(self.peer, e) from e
        if fingerprint(self._tls) != wanted:
            raise RefusedError(
                f"{self.peer}: its certificate is not the one that the control lane's peer has"
            )

    def _wait(self, events: int, deadline: float | None = None) -> None:
        self._poll.modify(self._tls, events)
        patience = None if deadline is None else max(0, int(1000 * (deadline - time.monotonic())))
        if not self._poll.poll(patience):
            raise LinkError(f"{self.peer}: no TLS handshake within {HANDSHAKE_S:g} s")

    # --- receiving ---

    def _fill(self, view: memoryview) -> int:
        done = 0
        while done < len(view):
            try:
                got = self._tls.recv_into(view[done:])
            except ssl.SSLWantReadError:
                self._wait(select.POLLIN)
                continue
            except ssl.SSLWantWriteError:
                self._wait(select.POLLOUT)
                continue
            except OSError as e:
                raise trouble(self.peer, e) from e
            if not got:
                break
            done += got
        self._stats.add(Counter.BYTES_RECEIVED, done)
        return done

    def pending(self) -> bool:
        """Tell whether something was received already that poll() does not see."""
        return self._tls.pending() > 0

    # --- sending ---

    def send(self, *parts: bytes | memoryview) -> None:
        """Send all of it, in records as full as they get.  Raises LinkError."""
        gathered = 0
        for part in parts:
            view = memoryview(part)
            if gathered:
                # A header goes into the record of what follows it.
                taken = min(len(view), _RECORD - gathered)
                self._first[gathered : gathered + taken] = view[:taken]
                gathered += taken
                view = view[taken:]
                if gathered < _RECORD:
                    continue
                self._send(self._first)
                gathered = 0
            if len(view) < _RECORD:
                self._first[: len(view)] = view
                gathered = len(view)
            else:
                self._send(view)
        if gathered:
            self._send(self._first[:gathered])

    def _send(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            try:
                done += self._tls.send(view[done:])
            except ssl.SSLWantWriteError:
                self._wait(select.POLLOUT)
            except ssl.SSLWantReadError:
                self._wait(select.POLLIN)
            except OSError as e:
                raise trouble(self.peer, e) from e
        self._stats.add(Counter.BYTES_SENT, done)

    def send_some(self, data: bytearray) -> int:
        """Send what fits now, return how much.  The rest has to be offered again, unchanged, with
        more behind it or not.  Raises LinkError.
        """
        try:
            sent = self._tls.send(data)
        except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
            return 0
        except OSError as e:
            raise trouble(self.peer, e) from e
        self._stats.add(Counter.BYTES_SENT, sent)
        return sent
