# SPDX-License-Identifier: GPL-2.0-or-later
"""Addresses as QEMU's users write them: tcp:HOST:PORT."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from pyumem.errors import UsageError

_EXAMPLE = "write tcp:HOST:PORT, for example tcp:192.0.2.7:4444 or tcp:[2001:db8::7]:4444"


@dataclass(frozen=True, slots=True)
class Address:
    """A host and a port.  An empty host is any address of this machine (listening only)."""

    host: str
    port: int

    def __str__(self) -> str:
        """Return the form that parse() takes."""
        host = f"[{self.host}]" if ":" in self.host else self.host or "0"
        return f"tcp:{host}:{self.port}"


def parse(uri: str, *, listening: bool) -> Address:
    """Read tcp:HOST:PORT or tcp:[IPV6]:PORT.  For a listener only: HOST 0 is any address, an empty
    one is this host's loopback.

    Raises UsageError for anything else.
    """
    scheme, _, rest = uri.partition(":")
    if scheme != "tcp":
        raise UsageError(f"{uri}: only tcp: addresses are supported; {_EXAMPLE}")
    if rest.startswith("["):
        host, bracket, tail = rest[1:].partition("]")
        if not bracket or not tail.startswith(":") or not host:
            raise UsageError(f"{uri}: {_EXAMPLE}")
        port = tail[1:]
    else:
        host, colon, port = rest.rpartition(":")
        if not colon or ":" in host:
            raise UsageError(f"{uri}: {_EXAMPLE}")
    if not port.isascii() or not port.isdigit() or not 1 <= int(port) <= 65535:
        raise UsageError(f"{uri}: {port!r} is no port within 1..65535; {_EXAMPLE}")
    if not listening and host in ("", "0"):
        raise UsageError(f"{uri}: it names no host to connect to; {_EXAMPLE}")
    return Address("" if host == "0" else host or "localhost", int(port))


def listen(address: Address, backlog: int = 64) -> list[socket.socket]:
    """Return listening sockets, not blocking.  Raises UsageError that names the address."""
    try:
        if not address.host and socket.has_dualstack_ipv6():
            found = [
                socket.create_server(
                    ("", address.port),
                    family=socket.AF_INET6,
                    dualstack_ipv6=True,
                    backlog=backlog,
                )
            ]
        else:
            found = []
            # Once per address: a name may stand for an IPv4 and an IPv6 one.
            infos = socket.getaddrinfo(
                address.host or "0.0.0.0", address.port, type=socket.SOCK_STREAM
            )
            for family, at in dict.fromkeys((info[0], info[4]) for info in infos):
                found.append(socket.create_server(at[:2], family=family, backlog=backlog))
    except OSError as e:
        raise UsageError(f"cannot listen on {address}: {e.strerror or e}") from e
    for sock in found:
        sock.setblocking(False)
    return found


def name_of(sockaddr: object) -> str:
    """Return a peer's address as text for a log."""
    if isinstance(sockaddr, tuple) and len(sockaddr) >= 2:
        host = str(sockaddr[0]).removeprefix("::ffff:")
        return f"[{host}]:{sockaddr[1]}" if ":" in host else f"{host}:{sockaddr[1]}"
    return "local"
