# SPDX-License-Identifier: GPL-2.0-or-later
"""Live ports and lanes of both sides against peers that send anything: no crash, no hang, no
growth; what was cached stays, and the next peer is served.

What hypothesis makes is as near to the protocol as it can be: frames with right headers and wrong
numbers, cut, doubled, and bytes that are none.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyumem import hello as messages
from pyumem import wire
from pyumem.address import Address
from pyumem.area import Area
from pyumem.claims import ClaimMap, Slots
from pyumem.compression import Compress
from pyumem.errors import UmemError
from pyumem.hello import AreaSpec, Challenge, Hello, Lane
from pyumem.incoming import IncomingRequest, IncomingVm
from pyumem.lanes.prefetch import NO_PREFETCH
from pyumem.ram import PAGE_SIZE
from pyumem.source_lanes import Lanes, Session
from pyumem.tls import Credentials, Security
from pyumem.verdicts import Verdicts
from pyumem.wire import Kind
from tests import certificates
from tests.unit.fakes import open_descriptors
from tests.unit.test_incoming import FakeArea, Launcher
from tests.unit.test_lanes import Lane as LaneThread
from tests.unit.test_lanes import RawPeer, World, tcp_pair

FUZZ = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
ANSWER_S = 10.0

numbers = st.one_of(st.integers(0, 3), st.integers(0, 400), st.just((1 << 32) - 1))
long_numbers = st.one_of(st.integers(0, 400), st.integers(0, (1 << 64) - 1))


@st.composite
def frames(draw: st.DrawFn) -> bytes:
    """A frame: of any kind, with a payload of the length that it says, or nearly."""
    kind = draw(st.sampled_from([*map(int, Kind), 0, 77, 255]))
    payload = draw(
        st.one_of(
            st.binary(max_size=64),
            st.builds(lambda n: bytes(8 * n), st.integers(0, 40)),
            st.builds(lambda n: bytes(n * PAGE_SIZE), st.integers(0, 2)),
            st.builds(lambda n: zstandard.compress(b"x" * n * PAGE_SIZE), st.integers(0, 2)),
            st.sampled_from([b"{}", b'{"reason":null}', b'{"reason":"x"}', b"[]", b"{" * 50]),
        )
    )
    length = draw(st.sampled_from([len(payload)] * 6 + [len(payload) + 1, 0, (1 << 32) - 1]))
    head = wire.HEADER.pack(
        draw(st.sampled_from([wire.MAGIC] * 9 + [0x5151])),
        draw(st.sampled_from([wire.VERSION] * 9 + [9])),
        kind,
        length,
        draw(st.one_of(st.integers(0, 3), st.just(0xFFFF))),
        draw(st.sampled_from([0, 0, 0, 1])),
        draw(numbers),
        draw(long_numbers),
    )
    return head + payload


talk = st.lists(st.one_of(frames(), st.binary(max_size=40)), max_size=6).map(b"".join)


# --- page lanes ---


@pytest.fixture
def lanes_world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path, sizes=(300, 100))
    yield world
    world.close()


@pytest.mark.parametrize("urgent", [True, False])
@given(data=talk)
@settings(FUZZ, max_examples=150)
def test_destination_lanes(lanes_world: World, urgent: bool, data: bytes) -> None:
    world = lanes_world
    before = [bytes(area.cached) for area in world.areas]
    peer = RawPeer(world, urgent)
    try:
        with contextlib.suppress(OSError):
            peer.sock.sendall(data)
            peer.sock.shutdown(socket.SHUT_WR)
        peer.lane.ended(ANSWER_S)
    finally:
        peer.sock.close()
    for area, was in zip(world.areas, before, strict=True):
        assert all(now or not then for now, then in zip(area.cached, was, strict=True))


@given(data=talk)
@settings(FUZZ, max_examples=150)
def test_the_sources_urgent_lane(lanes_world: World, data: bytes) -> None:
    from pyumem.lanes import source_urgent

    world = lanes_world
    mine, other = tcp_pair()
    link = world._link("su", other)
    lane = LaneThread(
        lambda channel: source_urgent.UrgentLane(
            channel, link, world._ram(), world._claims(), world.stats["su"]
        ).run()
    )
    world.lanes.append(lane)
    lane.go()
    with mine:
        with contextlib.suppress(OSError):
            mine.sendall(data)
            mine.shutdown(socket.SHUT_WR)
        assert isinstance(lane.ended(ANSWER_S), UmemError)


# --- the destination's port ---


def greet(sock: socket.socket, token: bytes, session: str, rest: bytes) -> None:
    """Say a right HELLO of a control lane, then the rest."""
    head = sock.recv(wire.HEADER_SIZE, socket.MSG_WAITALL)
    payload = sock.recv(wire.unpack(head).length, socket.MSG_WAITALL)
    nonce = Challenge.from_json(wire.unpack_json(Kind.CHALLENGE, memoryview(payload))).nonce
    hello = Hello(Lane.CONTROL, session, "vm1", secrets.token_hex(32), "fuzz", resume=True)
    text = wire.pack_json(Kind.HELLO, hello.to_json())[wire.HEADER_SIZE :]
    proof = messages.mac(token, "source", nonce, text)
    sock.sendall(wire.pack(Kind.HELLO, len(proof) + len(text)) + proof + text + rest)


def pester(port: int, data: bytes, known: bool) -> None:
    """Connect, talk, and hang up when the other side has."""
    with socket.create_connection(("127.0.0.1", port), timeout=ANSWER_S) as sock:
        try:
            if known:
                greet(sock, b"secret", "1" * 32, data)
            else:
                sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(65536):
                pass
        except TimeoutError:
            raise AssertionError("it does not hang up") from None
        except OSError:
            pass  # it was quicker


@pytest.mark.parametrize("tls", [False, True])
def test_the_destinations_port(
    tls: bool,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hundreds of strangers, and of peers that have the token and know nothing else."""
    ram = tmp_path / "ram0"
    ram.write_bytes(bytes(2 * PAGE_SIZE))
    creds = Credentials(certificates.for_localhost(tmp_path_factory)) if tls else None
    logging.getLogger("pyumem").setLevel(logging.CRITICAL)

    async def main() -> None:
        area, launcher = FakeArea(ram), Launcher()
        monkeypatch.setattr(Area, "create", lambda _name, _size, **_: area)
        request = IncomingRequest(
            name="vm1",
            address=Address("127.0.0.1", 0),
            blocks=(AreaSpec("ram0", 2 * PAGE_SIZE, PAGE_SIZE),),
            qmp=tmp_path / "qmp.sock",
            incoming=tmp_path / "incoming.sock",
            autostart=True,
            touch=False,
        )
        vm = IncomingVm(request, Security(b"secret", creds), launcher, None, Verdicts())
        await vm.open()
        port = vm._sockets[0].getsockname()[1]
        life = asyncio.create_task(vm.run())
        fds: list[int] = []

        @given(data=talk, known=st.booleans())
        @settings(FUZZ, max_examples=150)
        def everybody(data: bytes, known: bool) -> None:
            pester(port, data, known and not tls)
            fds.append(open_descriptors())

        try:
            with ThreadPoolExecutor(1) as pool:
                await asyncio.get_running_loop().run_in_executor(pool, everybody)
            async with asyncio.timeout(ANSWER_S):
                while len(vm._tasks) > len(vm._sockets):
                    await asyncio.sleep(0.01)
            assert len(vm._strangers) == 0, "a stranger keeps a place"
            assert max(fds) <= min(fds) + 4, "descriptors grow"
            assert not life.done() and vm.migration is None
        finally:
            life.cancel()
            await asyncio.gather(life, return_exceptions=True)

    before = open_descriptors()
    try:
        asyncio.run(main())
    finally:
        logging.getLogger("pyumem").setLevel(logging.NOTSET)
    assert open_descriptors() == before, "a descriptor is left"


# --- the source's control lane ---


def lying_destination(server: socket.socket, data: bytes, welcome: bool) -> None:
    """Take one connection; after a WELCOME that the source believes, or in place of everything, say
    the data.
    """
    sock, _ = server.accept()
    with sock, contextlib.suppress(OSError):
        if welcome:
            challenge = Challenge("ab" * 32, "fuzz").to_json()
            sock.sendall(wire.pack_json(Kind.CHALLENGE, challenge))
            head = sock.recv(wire.HEADER_SIZE, socket.MSG_WAITALL)
            payload = sock.recv(wire.unpack(head).length, socket.MSG_WAITALL)
            text = payload[messages.MAC_SIZE :]
            nonce = Hello.from_json(wire.unpack_json(Kind.HELLO, memoryview(text))).nonce
            answer = wire.pack_json(Kind.WELCOME, {"software": "x", "lane_secret": ""})
            answer = answer[wire.HEADER_SIZE :]
            proof = messages.mac(b"secret", "destination", nonce, answer)
            frame = wire.pack(Kind.WELCOME, len(proof) + len(answer)) + proof + answer
            sock.sendall(frame)
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(65536):
            pass


@given(data=talk, welcome=st.booleans(), committed=st.booleans())
@settings(FUZZ, max_examples=100)
def test_the_sources_control_lane(data: bytes, welcome: bool, committed: bool) -> None:
    claims = ClaimMap.create(Slots([2]))

    async def main(address: Address) -> UmemError | None:
        session = Session(
            *("0" * 32, "vm1", Security(b"secret"), 1, NO_PREFETCH, Compress.AUTO),
            *((), (), claims, None),
        )
        lanes = Lanes(session, address, lambda _: None, lambda _: committed)
        try:
            async with asyncio.timeout(ANSWER_S):
                await lanes.connect()
                lanes.follow()
                assert lanes.control is not None
                await lanes.control
            return None
        except UmemError as e:
            return e
        finally:
            await lanes.close()

    before = open_descriptors()
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        played = pool.submit(lying_destination, server, data, welcome)
        error = asyncio.run(main(Address("127.0.0.1", server.getsockname()[1])))
        played.result(ANSWER_S)
    if not welcome:
        assert isinstance(error, UmemError)
    claims.close()
    assert open_descriptors() <= before
