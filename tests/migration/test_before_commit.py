# SPDX-License-Identifier: GPL-2.0-or-later
"""Whatever goes wrong before the commit leaves the guest running at the source.

One guest goes through all of it and moves for real at the end, with its memory checked: nothing
that was tried before did it any harm.  The tests depend on their order.
"""

import json
import os
import signal
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pyumem import wire
from pyumem.wire import Kind
from tests.migration.world import (
    PATIENCE,
    PORT,
    Program,
    World,
    alive,
    eventually,
    report_of,
    world,
)
from tests.vm.guest import GuestConsole, GuestSpec
from tests.vm.hosts import Link

# What is tried here is in the daemons, whatever kernel they run on.
pytestmark = pytest.mark.one_kernel

# TCG: this guest lives for minutes, and the test machine's emulated SVM may reset one that runs
# under KVM, see Documentation/testing.rst.  Nothing here is about KVM.
SPEC = GuestSpec(workload="verify", writers=1, mb=24, memory="96M", accel="tcg")
FAST = Link()
# Device state takes seconds then: long enough to break something while it moves.
SLOW = Link(rate="500kbit", delay="1ms")


class Scene:
    """The source with its guest, for all tests of this file."""

    def __init__(self, w: World) -> None:
        self.w = w
        self.token = w.tmp / "token"
        self.token.write_text("secret\n")
        self.token.chmod(0o600)
        self.qemu, self.console = w.guest(SPEC)
        self.console.wait("verify", timeout=PATIENCE)
        # Until it moves for real it need not take a CPU from everybody else.
        self.console.send("stop")
        self.serve = w.serve("--token-file", str(self.token))

    def migrate(self, *arguments: str) -> Program:
        return self.w.migrate("--token-file", str(self.token), *arguments)

    def still_here(self) -> None:
        """The guest runs at the source, QEMU is as it was, and no area is left behind."""
        assert self.qemu.process.poll() is None
        alive(self.console)
        assert (Path("/dev/shm/umem-src/vm1/ram0")).exists()
        assert not list((self.w.source.runtime / "migrate").glob("*.json"))

    def nothing_left(self) -> None:
        eventually(lambda: self.w.areas() == [], why="an area was left behind")


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with world(tmp_path_factory.mktemp("before")) as w:
        yield Scene(w)


@pytest.fixture
def expected(scene: Scene) -> Iterator[tuple[Program, GuestConsole]]:
    """A QEMU that waits at the destination."""
    yield scene.w.expect(SPEC)
    scene.w.source.set_link(FAST)


STRANGERS = [
    (b"QEVM\0\0\0\3" + bytes(100), "QEMU's own migration stream"),
    (b"GET / HTTP/1.0\r\n\r\n", "an HTTP client"),
    (b"\1\2\3\4" * 100, "not umem's protocol"),
    (wire.pack(Kind.HELLO)[:2] + b"\x09" + wire.pack(Kind.HELLO)[3:], "version 9"),
    (struct.pack("!HBBIHHIQ", wire.MAGIC, 1, 2, 1 << 31, 0, 0, 0, 0), "at most"),
    (b"", "left without a word"),
]


def test_bad_peers_of_a_waiting_vm(scene: Scene) -> None:
    """Strangers, liars and mistakes, one after the other; the VM goes on waiting."""
    w, serve = scene.w, scene.serve
    qemu, _ = w.expect(replace(SPEC, memory="128M"))
    say_to_port(w, [data for data, _ in STRANGERS])
    for _, what in STRANGERS:
        serve.wait_said(what)

    (w.tmp / "other").write_text("wrong\n")
    (w.tmp / "other").chmod(0o600)
    migrate = w.migrate("--token-file", str(w.tmp / "other"))
    assert migrate.wait() == 3
    for said in (migrate, serve):
        said.wait_said("the tokens of the two hosts differ")

    migrate = scene.migrate()
    assert migrate.wait() == 3
    for said in (migrate, serve):
        said.wait_said("RAM block ram0 has 100663296 bytes at the source and 134217728 here")

    assert w.vm()["state"] == "waiting"
    scene.still_here()

    # One that has the token, and a page past the end: its migration fails, with its name.
    lie = wire.pack_pages(0, 32768, 1, 4096) + bytes(4096)
    address = w.destination.address
    liar = w.start(
        w.source, *("python", "-m", "tests.migration.liar", address, str(PORT), lie.hex())
    )
    assert liar.wait() == 0, liar.said()
    for said in (liar, serve):
        said.wait_said("PAGES of 1 page(s) from page 32768 on, area vm1.ram0 has 32768 pages")
    assert "ABORT" in liar.said()
    qemu.wait()
    scene.nothing_left()


def say_to_port(w: World, words: list[bytes]) -> None:
    """Say something to the destination's port, from the source, on a connection for each."""
    script = (
        "import socket\n"
        f"for data in {[data.hex() for data in words]!r}:\n"
        f"    s = socket.create_connection(({w.destination.address!r}, {PORT}))\n"
        "    try:\n"
        "        s.sendall(bytes.fromhex(data))\n"
        "        s.shutdown(socket.SHUT_WR)\n"
        "        while s.recv(4096): pass\n"
        "    except OSError: pass  # thrown out: ECONNRESET, EPIPE, or ENOTCONN of the shutdown\n"
    )
    done = w.source.run(["python3", "-S", "-c", script], timeout=PATIENCE)
    assert done.returncode == 0, done.stderr


def test_another_version_at_the_destination(scene: Scene) -> None:
    """A peer from the future greets the source."""
    frame = wire.pack_json(Kind.CHALLENGE, {"nonce": "ab" * 32, "software": "umem 9"})
    script = (
        "import socket\n"
        f"s = socket.create_server(({scene.w.destination.address!r}, {PORT}))\n"
        "print('listening', flush=True)\n"
        "c, _ = s.accept()\n"
        f"c.sendall(bytes.fromhex({(frame[:2] + bytes([9]) + frame[3:]).hex()!r}))\n"
        "c.recv(1)\n"
    )
    peer = scene.w.start(scene.w.destination, "python3", "-S", "-c", script)
    peer.wait_said("listening")
    migrate = scene.migrate()
    assert migrate.wait() == 3
    assert "speaks version 9 of the protocol, this side version 1" in migrate.said()
    scene.still_here()


def begin_slowly(scene: Scene) -> Program:
    """Start a migration that stays in its device phase for seconds."""
    scene.w.source.set_link(SLOW)
    migrate = scene.migrate()

    def in_device() -> bool:
        assert migrate.process.poll() is None, migrate.said()
        return scene.w.vm().get("state") == "device"

    eventually(in_device, why=f"{migrate.said()} {scene.serve.said()}")
    return migrate


def test_ctrl_c(scene: Scene, expected: tuple[Program, GuestConsole]) -> None:
    migrate = begin_slowly(scene)
    migrate.process.send_signal(signal.SIGINT)
    assert migrate.wait() == 130, migrate.said()
    assert "vm1 runs on at the source" in migrate.said()
    scene.still_here()
    assert expected[0].wait() is not None, "the QEMU that waited in vain is gone"
    scene.serve.wait_said("migration cancelled")
    scene.nothing_left()


def test_the_destinations_qemu_dies(scene: Scene, expected: tuple[Program, GuestConsole]) -> None:
    migrate = begin_slowly(scene)
    os.kill(scene.w.vm()["qemu_pid"], signal.SIGKILL)
    assert migrate.wait() == 1, migrate.said()
    assert "the destination's QEMU" in migrate.said() and "runs on at the source" in migrate.said()
    scene.still_here()
    assert expected[0].wait() == 128 + signal.SIGKILL
    scene.nothing_left()


def test_serve_is_killed(scene: Scene, expected: tuple[Program, GuestConsole]) -> None:
    migrate = begin_slowly(scene)
    scene.serve.process.kill()
    scene.serve.process.wait()
    assert migrate.wait() == 1, migrate.said()
    assert "runs on at the source" in migrate.said()
    scene.still_here()
    # Its QEMU, which may wait for pages of an area without a server, is ended by its launcher.
    assert expected[0].wait() == 1
    assert "its QEMU was ended: `umemctl serve` is gone" in expected[0].said()
    scene.nothing_left()
    # What it left does not stop the next one.
    scene.serve = scene.w.serve("--token-file", str(scene.token))


def test_serve_is_stopped(scene: Scene, expected: tuple[Program, GuestConsole]) -> None:
    migrate = begin_slowly(scene)
    scene.serve.process.terminate()
    assert scene.serve.wait() == 0, scene.serve.said()
    assert migrate.wait() == 1, migrate.said()
    assert "umemctl serve was stopped" in migrate.said()
    scene.still_here()
    expected[0].wait()
    scene.nothing_left()
    scene.serve = scene.w.serve("--token-file", str(scene.token))


def test_and_then_it_moves(scene: Scene, expected: tuple[Program, GuestConsole]) -> None:
    w = scene.w
    w.source.set_link(FAST)
    _, after = expected
    after.connected()
    scene.console.send("go")
    alive(scene.console)
    migrate = scene.migrate("--json")
    assert migrate.wait(300) == 0, migrate.said()
    told = report_of(migrate)
    print(json.dumps(told))
    assert scene.qemu.wait() == 0, "the source's QEMU can never run it again"
    verdict = after.verdict(300)
    assert verdict.ok and verdict.bad == 0, verdict.text
    assert told["demand_latency_p50_us"] > 0
