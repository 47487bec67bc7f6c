# SPDX-License-Identifier: GPL-2.0-or-later
"""tcp:HOST:PORT and what is not."""

from __future__ import annotations

import socket

import pytest

from pyumem.address import Address, listen, name_of, parse
from pyumem.errors import UsageError


@pytest.mark.parametrize(
    ("uri", "host", "port"),
    [
        ("tcp:192.0.2.7:4444", "192.0.2.7", 4444),
        ("tcp:[2001:db8::7]:4444", "2001:db8::7", 4444),
        ("tcp:host.example:1", "host.example", 1),
    ],
)
def test_addresses(uri: str, host: str, port: int) -> None:
    for listening in (True, False):
        assert parse(uri, listening=listening) == Address(host, port)
    assert str(Address(host, port)) == uri


@pytest.mark.parametrize(("uri", "host"), [("tcp:0:4444", ""), ("tcp::4444", "localhost")])
def test_no_host_is_for_listeners(uri: str, host: str) -> None:
    assert parse(uri, listening=True) == Address(host, 4444)
    assert parse(str(parse(uri, listening=True)), listening=True) == Address(host, 4444)
    with pytest.raises(UsageError, match="no host to connect to"):
        parse(uri, listening=False)


@pytest.mark.parametrize(
    "uri",
    [
        *("unix:/tmp/x", "rdma:a:1", "exec:cat", "fd:3", "defer", "4444", ""),
        *("tcp:4444", "tcp:a", "tcp:a:", "tcp:a:0", "tcp:a:65536", "tcp:a:-1", "tcp:a:4x"),
        *("tcp:2001:db8::7:4444", "tcp:[::1]", "tcp:[::1]4444", "tcp:[]:1", "tcp:a:\u0664"),
    ],
)
def test_everything_else_is_refused_with_an_example(uri: str) -> None:
    for listening in (True, False):
        with pytest.raises(UsageError, match="tcp:HOST:PORT"):
            parse(uri, listening=listening)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


@pytest.mark.parametrize("host", ["", "127.0.0.1", "localhost"])
def test_listening(host: str) -> None:
    port = free_port()
    sockets = listen(Address(host, port))
    assert sockets and not any(sock.getblocking() for sock in sockets)
    socket.create_connection(("127.0.0.1", port)).close()
    with pytest.raises(UsageError, match=f"cannot listen on tcp:.*:{port}"):
        listen(Address(host, port))
    for sock in sockets:
        sock.close()


def test_names() -> None:
    assert name_of(("::ffff:192.0.2.7", 5, 0, 0)) == "192.0.2.7:5"
    assert name_of(("2001:db8::7", 5, 0, 0)) == "[2001:db8::7]:5"
    assert name_of("") == "local"
