# SPDX-License-Identifier: GPL-2.0-or-later
"""TLS: who is let in, who is not, and what both sides say then."""

from __future__ import annotations

import asyncio
import datetime
import os
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyumem import greeting, wire
from pyumem.address import Address
from pyumem.cli.main import main
from pyumem.errors import LinkError, ProtocolError, RefusedError, UmemError, UsageError
from pyumem.greeting import (
    AsyncLink,
    admit,
    introduce,
    introduce_control,
    lane_security,
    welcome,
)
from pyumem.hello import AreaSpec, Hello, Lane, Welcome
from pyumem.lanes import tls_link
from pyumem.lanes.tls_link import TlsLink
from pyumem.stats import StatsBlock
from pyumem.tls import Credentials, LaneTls, Security, find_credentials, is_loopback
from pyumem.wire import Kind
from tests import certificates

CONTROL = Hello(
    lane=Lane.CONTROL,
    session="0" * 32,
    vm="vm1",
    nonce="ab" * 32,
    software="umem 0",
    areas=(AreaSpec("ram0", 1 << 30, 4096),),
)
URGENT = Hello(lane=Lane.URGENT, session="0" * 32, vm="vm1", nonce="cd" * 32, software="umem 0")

ONE_FIXTURE = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

Side = Callable[[AsyncLink], Awaitable[Any]]


@pytest.fixture
def creds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return certificates.for_localhost(tmp_path_factory)


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Of another CA."""
    return certificates.make(tmp_path / "foreign", "localhost")


def run(source: Side, destination: Side) -> tuple[Any, Any]:
    """Run both sides; each result may be an error.  A side that ends in one closes."""

    async def both() -> tuple[Any, Any]:
        one, two = socket.socketpair()
        links = AsyncLink(one, "the destination"), AsyncLink(two, "the source")

        async def side(link: AsyncLink, work: Side) -> object:
            try:
                return await work(link)
            except UmemError as e:
                link.close()
                return e

        results = await asyncio.gather(side(links[0], source), side(links[1], destination))
        for link in links:
            link.close()
        return results[0], results[1]

    return asyncio.run(both())


def with_tls(directory: Path, **more: Any) -> Security:  # noqa: ANN401
    return Security(credentials=Credentials(directory), **more)


def received(security: Security, secret: bytes | None = None) -> Side:
    """A destination that takes whoever proves what it should."""

    async def destination(link: AsyncLink) -> Any:  # noqa: ANN401
        hello = await admit(link, security, lambda: secret)
        lanes = lane_security(link, security)
        token = security.token if hello.lane is Lane.CONTROL else secret
        assert token is not None
        await welcome(link, token, hello, lanes)
        await link.send_json(Kind.COMPLETE, {"x": "y" * 40000})
        frame = await link.receive()
        assert frame is not None and len(frame[1]) == 200_000
        return hello, lanes

    return destination


def sent(security: Security, host: str = "localhost") -> Side:
    async def source(link: AsyncLink) -> Any:  # noqa: ANN401
        lanes = await introduce_control(link, security, CONTROL, host)
        frame = await link.receive()
        assert frame is not None and len(frame[1]) > 40000
        await link.send(wire.pack(Kind.DEVICE, 200_000), memoryview(bytes(200_000)))
        return lanes

    return source


@pytest.mark.parametrize("token", [b"", b"secret"])
def test_both_prove_themselves(creds: Path, token: bytes) -> None:
    lanes, (hello, ours) = run(
        sent(with_tls(creds, token=token)), received(with_tls(creds, token=token))
    )
    assert hello == CONTROL
    assert lanes.token == ours.token and len(lanes.token) == 64
    server, client = (certificates.fingerprint(creds, role) for role in ("server", "client"))
    assert lanes.tls == LaneTls(creds, False, "localhost", server)
    assert ours.tls == LaneTls(creds, True, "", client)


def test_a_page_lane_proves_the_secret_in_clear(creds: Path) -> None:
    async def destination(link: AsyncLink) -> Hello:
        hello = await admit(link, with_tls(creds), lambda: b"of the control lane")
        await welcome(link, b"of the control lane", hello)
        return hello

    told, hello = run(lambda link: introduce(link, b"of the control lane", URGENT), destination)
    assert isinstance(told, Welcome) and hello == URGENT


@pytest.mark.parametrize("secret", [None, b"another"])
def test_a_page_lane_without_the_secret(creds: Path, secret: bytes | None) -> None:
    source, destination = run(
        lambda link: introduce(link, b"guess", URGENT),
        lambda link: admit(link, with_tls(creds), lambda: secret),
    )
    for told in (source, destination):
        assert isinstance(told, RefusedError) and "no such migration is known" in str(told)


def test_a_control_lane_in_clear_is_not_taken(creds: Path) -> None:
    """Not even of one that somehow knows the secret."""
    source, destination = run(
        lambda link: introduce(link, b"s", CONTROL),
        lambda link: admit(link, with_tls(creds), lambda: b"s"),
    )
    for told in (source, destination):
        assert isinstance(told, RefusedError) and "has to come with TLS" in str(told)


def test_a_page_lane_under_the_daemons_tls_is_not_taken(creds: Path) -> None:
    async def source(link: AsyncLink) -> None:
        await introduce_control(link, with_tls(creds), URGENT, "localhost")

    told, _ = run(source, received(with_tls(creds)))
    assert isinstance(told, RefusedError) and "has to come in clear" in str(told)


@pytest.mark.parametrize(("here", "there"), [(b"a", b"b"), (b"", b"b"), (b"a", b"")])
def test_the_token_counts_too(creds: Path, here: bytes, there: bytes) -> None:
    source, destination = run(
        sent(with_tls(creds, token=here)), received(with_tls(creds, token=there))
    )
    for told in (source, destination):
        assert isinstance(told, RefusedError) and "tokens of the two hosts differ" in str(told)


def test_one_side_only_has_tls(creds: Path) -> None:
    source, _ = run(sent(Security(insecure=True)), received(with_tls(creds)))
    assert isinstance(source, RefusedError) and "wants TLS: give --tls-creds" in str(source)
    source, _ = run(sent(with_tls(creds)), received(Security(insecure=True)))
    assert isinstance(source, RefusedError) and "has no TLS" in str(source)


def test_a_foreign_ca(creds: Path, foreign: Path) -> None:
    source, destination = run(sent(with_tls(creds)), received(with_tls(foreign)))
    assert isinstance(source, RefusedError), source
    assert "the destination: its certificate is not accepted" in str(source)
    assert isinstance(destination, RefusedError | LinkError) and "the source" in str(destination)


def test_a_client_of_a_foreign_ca(creds: Path, foreign: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"  # believes our server, is not believed by it
    shutil.copytree(foreign, mixed)
    shutil.copy(creds / "ca-cert.pem", mixed)
    source, destination = run(sent(with_tls(mixed)), received(with_tls(creds)))
    assert isinstance(destination, RefusedError)
    assert "the source: its certificate is not accepted" in str(destination)
    assert isinstance(source, RefusedError | LinkError) and "the destination" in str(source)


def test_a_server_of_another_name(creds: Path) -> None:
    source, _ = run(sent(with_tls(creds), "elsewhere"), received(with_tls(creds)))
    assert isinstance(source, RefusedError) and "not valid for 'elsewhere'" in str(source)
    lanes, _ = run(
        sent(with_tls(creds, tls_hostname="localhost"), "elsewhere"), received(with_tls(creds))
    )
    assert lanes.tls.hostname == "localhost"


def test_an_address_is_a_name_too(creds: Path) -> None:
    lanes, _ = run(sent(with_tls(creds), "127.0.0.1"), received(with_tls(creds)))
    assert lanes.tls.hostname == "127.0.0.1"


def test_a_client_cannot_play_the_server(creds: Path, tmp_path: Path) -> None:
    liar = tmp_path / "liar"
    shutil.copytree(creds, liar)
    for what in ("cert", "key"):
        shutil.copy(creds / f"client-{what}.pem", liar / f"server-{what}.pem")
    source, _ = run(sent(with_tls(creds)), received(with_tls(liar)))
    assert isinstance(source, RefusedError) and "unsuitable certificate purpose" in str(source)


def test_a_revoked_client(creds: Path, tmp_path: Path) -> None:
    home = tmp_path / "ca"
    shutil.copytree(creds, home)
    (home / "index.txt").touch()
    (home / "crlnumber").write_text("01\n")
    (home / "ca.cnf").write_text(
        f"[ca]\ndefault_ca=us\n[us]\ndatabase={home}/index.txt\ncrlnumber={home}/crlnumber\n"
        "default_md=sha256\ndefault_crl_days=30\n"
    )
    base = ["openssl", "ca", "-config", str(home / "ca.cnf"), "-keyfile", str(home / "ca-key.pem")]
    base += ["-cert", str(home / "ca-cert.pem")]
    revoke = [*base, "-revoke", str(home / "client-cert.pem")]
    subprocess.run(revoke, check=True, capture_output=True)
    listed = [*base, "-gencrl", "-out", str(home / "ca-crl.pem")]
    subprocess.run(listed, check=True, capture_output=True)
    _, destination = run(sent(with_tls(creds)), received(with_tls(home)))
    assert isinstance(destination, RefusedError) and "revoked" in str(destination)


def test_old_tls_is_not_spoken(creds: Path) -> None:
    async def source(link: AsyncLink) -> None:
        await link.receive()
        await link.send(wire.pack(Kind.STARTTLS))
        context = Credentials(creds).client_context()
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        await link.start_tls(context, hostname="localhost")

    told, destination = run(source, received(with_tls(creds)))
    assert isinstance(told, UmemError) and isinstance(destination, UmemError)
    assert "unsupported protocol" in str(destination)


@settings(ONE_FIXTURE, max_examples=60)
@given(st.binary(max_size=600), st.booleans())
def test_garbage_in_place_of_a_handshake(creds: Path, garbage: bytes, as_record: bool) -> None:
    async def source(link: AsyncLink) -> None:
        await link.receive()
        data = garbage
        if as_record:  # a handshake record, as far as its header goes
            data = b"\x16\x03\x01" + len(garbage).to_bytes(2, "big") + garbage
        await link.send(wire.pack(Kind.STARTTLS) + data)
        link._sock.shutdown(socket.SHUT_WR)

    _, destination = run(source, received(with_tls(creds)))
    assert isinstance(destination, RefusedError | LinkError), destination
    assert "the source" in str(destination)


def test_a_handshake_that_does_not_end(creds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greeting, "GREETING_S", 0.3)

    async def source(link: AsyncLink) -> None:
        await link.receive()
        await link.send(wire.pack(Kind.STARTTLS) + b"\x16\x03\x01\x02\x00")
        await asyncio.sleep(1)

    _, destination = run(source, received(with_tls(creds)))
    assert isinstance(destination, ProtocolError) and "nothing valid within" in str(destination)


def test_the_connection_that_is_cut(creds: Path) -> None:
    async def source(link: AsyncLink) -> None:
        await introduce_control(link, with_tls(creds), CONTROL, "localhost")
        link.close()

    async def destination(link: AsyncLink) -> Any:  # noqa: ANN401
        hello = await admit(link, with_tls(creds))
        await welcome(link, b"", hello, lane_security(link, with_tls(creds)))
        return await link.receive()

    assert run(source, destination) == (None, None)


# --- a page lane's handshake ---


def shake(
    source: LaneTls, destination: LaneTls
) -> tuple[Future[TlsLink], Future[TlsLink], list[socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        other, _ = server.accept()
    with ThreadPoolExecutor(2) as pool:
        ends = [
            pool.submit(TlsLink, sock, name, StatsBlock.create(name), tls)
            for sock, name, tls in ((one, "destination", source), (other, "source", destination))
        ]
    return ends[0], ends[1], [one, other]


def test_a_lane_of_another_host(creds: Path) -> None:
    """Of the same CA, but not who the control lane's peer is."""
    client, server = (certificates.fingerprint(creds, role) for role in ("client", "server"))
    source, destination, _ = shake(
        LaneTls(creds, False, "localhost", server), LaneTls(creds, True, "", "0" * 64)
    )
    with pytest.raises(RefusedError, match="source: its certificate is not the one"):
        destination.result()
    source.result().close()
    source, destination, _ = shake(
        LaneTls(creds, False, "localhost", "0" * 64), LaneTls(creds, True, "", client)
    )
    with pytest.raises(RefusedError, match="destination: its certificate is not the one"):
        source.result()


def test_a_lane_whose_peer_says_nothing(creds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls_link, "HANDSHAKE_S", 0.2)
    one, other = socket.socketpair()
    with other, pytest.raises(LinkError, match=r"no TLS handshake within 0\.2 s"):
        TlsLink(one, "peer", StatsBlock.create("x"), LaneTls(creds, True, "", "0" * 64))


def test_a_lane_that_gets_garbage(creds: Path) -> None:
    one, other = socket.socketpair()
    with other:
        other.sendall(os.urandom(300))
        with pytest.raises((LinkError, RefusedError), match="peer"):
            TlsLink(one, "peer", StatsBlock.create("x"), LaneTls(creds, True, "", "0" * 64))


SIZES = st.lists(st.integers(0, 70_000), min_size=1, max_size=5)


@settings(ONE_FIXTURE, max_examples=30)
@given(st.lists(SIZES, min_size=1, max_size=4))
def test_what_is_sent_arrives(creds: Path, frames: list[list[int]]) -> None:
    client, server = (certificates.fingerprint(creds, role) for role in ("client", "server"))
    one, other, _ = shake(
        LaneTls(creds, False, "localhost", server), LaneTls(creds, True, "", client)
    )
    source, destination = one.result(), other.result()
    data = [[os.urandom(size) for size in sizes] for sizes in frames]

    def send() -> None:
        for parts in data:
            source.send(*parts)

    sender = threading.Thread(target=send)
    sender.start()
    for parts in data:
        whole = b"".join(parts)
        got = memoryview(bytearray(len(whole)))
        destination.receive_into(got)
        assert got == whole
    sender.join()
    assert not destination.pending()
    source.close()
    assert destination.header() is None
    destination.close()


def test_what_does_not_fit_goes_later(creds: Path) -> None:
    client, server = (certificates.fingerprint(creds, role) for role in ("client", "server"))
    one, other, _ = shake(
        LaneTls(creds, False, "localhost", server), LaneTls(creds, True, "", client)
    )
    source, destination = one.result(), other.result()
    whole = os.urandom(8 << 20)
    out, given = bytearray(), 0
    got = memoryview(bytearray(len(whole)))
    receiver = threading.Thread(target=destination.receive_into, args=(got,))
    full = 0
    while given < len(whole) or out:
        out += whole[given : given + 100_000]
        given += 100_000
        sent = source.send_some(out)
        del out[:sent]
        if not sent:
            full += 1
            if not receiver.is_alive() and full == 3:
                receiver.start()
    receiver.join(20)
    assert full >= 3 and got == whole
    source.close()
    destination.close()


# --- what the user says ---


@pytest.mark.parametrize(
    ("host", "inside"),
    [
        *((host, True) for host in ("127.0.0.1", "localhost", "::1", "127.9.9.9")),
        *((host, False) for host in ("", "192.0.2.1", "2001:db8::1", "0.0.0.0", "no.such.invalid")),
    ],
)
def test_loopback(host: str, inside: bool) -> None:
    assert is_loopback(Address(host, 4444)) is inside
    assert Security().admits(Address(host, 4444)) is inside
    assert Security(insecure=True).admits(Address(host, 4444))
    assert Security(credentials=Credentials(Path("/x"))).admits(Address(host, 4444))


def test_a_network_without_tls_is_refused(tmp_path: Path) -> None:
    words = ["migrate", "-p", "tcp:192.0.2.1:4444", "--qmp", "/nowhere"]
    env = {"UMEM_RUNTIME_DIR": str(tmp_path)}
    result = CliRunner().invoke(main, words, env=env)
    assert result.exit_code == 2 and "--tls-creds" in result.output
    result = CliRunner().invoke(main, [*words, "--insecure"], env=env)
    assert result.exit_code == 1 and "/nowhere: No such file" in result.output
    result = CliRunner().invoke(main, [*words, "--insecure", "--tls-creds", "/tmp"], env=env)
    assert result.exit_code == 2 and "exclude each other" in result.output


def test_credentials_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyumem.tls.DEFAULT_DIRECTORY", tmp_path)
    assert find_credentials(None) is None
    (tmp_path / "ca-cert.pem").touch()
    assert find_credentials(None) == Credentials(tmp_path)
    with pytest.raises(UsageError, match="no such directory"):
        find_credentials(tmp_path / "x")

    def denied(_path: Path) -> bool:
        raise PermissionError

    monkeypatch.setattr(Path, "exists", denied)
    assert find_credentials(None) == Credentials(tmp_path)


def test_what_is_wrong_with_credentials(creds: Path, tmp_path: Path) -> None:
    mine = Credentials(tmp_path / "mine")
    shutil.copytree(creds, mine.directory)
    key = mine.directory / "server-key.pem"
    key.chmod(0o644)
    with pytest.raises(UsageError, match=r"chmod o= .*server-key.pem"):
        mine.server_context()
    mine.client_context()
    shutil.copy(creds / "client-key.pem", key)
    with pytest.raises(UsageError, match=r"server-cert.pem and server-key.pem: .*mismatch"):
        mine.server_context()
    key.write_text("nonsense")
    key.chmod(0o600)
    with pytest.raises(UsageError, match=r"server-cert.pem and server-key.pem"):
        mine.server_context()
    locked = ["openssl", "ec", "-aes256", "-passout", "pass:secret"]
    locked += ["-in", str(creds / "server-key.pem"), "-out", str(key)]
    subprocess.run(locked, check=True, capture_output=True)
    with pytest.raises(UsageError, match="keys with a password"):
        mine.server_context()
    key.unlink()
    with pytest.raises(UsageError, match=r"server-key.pem: No such file"):
        mine.server_context()
    (mine.directory / "ca-cert.pem").write_text("nonsense")
    with pytest.raises(UsageError, match=r"ca-cert.pem: no CA certificate"):
        mine.client_context()


def test_a_rehearsal(creds: Path, foreign: Path, tmp_path: Path) -> None:
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=30)
    assert abs(Credentials(creds).rehearse() - soon) < datetime.timedelta(days=1)
    mixed = tmp_path / "mixed"
    shutil.copytree(creds, mixed)
    for what in ("cert", "key"):
        shutil.copy(foreign / f"client-{what}.pem", mixed)
    with pytest.raises(UsageError, match=r"mixed: .*certificate"):
        Credentials(mixed).rehearse()
    late = certificates.make(tmp_path / "late", "localhost", days=1)
    assert Credentials(late).rehearse() < soon - datetime.timedelta(days=20)
